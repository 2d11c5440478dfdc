"""Train, measure and look inside one compact image embedding for many visual domains (UDON, NeurIPS 2024)."""

__version__ = "0.1.0"
