"""Audio: files, decoded tracks, clips for training, and latents of clips."""
