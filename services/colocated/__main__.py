"""`python -m services.colocated`: the host as a process, set up by its environment (`kimia.runtime.settings`)."""

from kimia.runtime.service import run_service
from services.colocated.host import NAME, Host

if __name__ == "__main__":
    raise SystemExit(run_service(Host.of, NAME))
