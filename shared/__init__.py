"""What every service may use: contracts, settings, errors, prompts, artefacts, data sets, the HTTP face, engines."""

__version__ = "0.1.0"
