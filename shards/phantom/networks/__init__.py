"""How the phantom's own networks are trained, measured and written as Hugging Face folders."""
