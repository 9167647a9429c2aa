"""Training and evaluation of the small FLUX.1-architecture model that ships with the toolkit."""
