"""What every process shares: settings, server, worker, health, metrics, logs."""
