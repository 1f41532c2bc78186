"""Export, merge, convert and push of E5-V adapters and models."""
