"""The stage ``generate``: responses of one model to a file of prompts."""
