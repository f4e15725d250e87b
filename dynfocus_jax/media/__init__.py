"""Media files to frames: containers, decoding, frame sampling, images, subtitles."""
