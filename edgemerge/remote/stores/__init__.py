"""Files in stores that fsspec knows: s3 by signed addresses, sftp and others by its connections."""
