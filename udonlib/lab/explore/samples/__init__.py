"""What data.ipynb shows of images: classes page by page, copies, and what training makes of an image."""
