"""The version of the distribution `model-surgery`; read by the build and written into receipts."""

__version__ = "0.1.0"
