"""Uploaded and generated image files: header checks, decoding, encoding, metadata."""
