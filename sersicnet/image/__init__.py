"""From an image to its sky, stars, PSF, detections and stamps."""
