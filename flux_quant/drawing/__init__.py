"""From noise to a picture: what is asked for, levels of noise, the loop, latents, the VAE, files."""
