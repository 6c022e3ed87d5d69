"""Train the embedded networks, and judge their images. The server never imports this package."""
