"""All three stages in one process, on one device."""
