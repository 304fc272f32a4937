"""kimia: the production service for Kimi-Audio. Importing this package imports nothing else."""
