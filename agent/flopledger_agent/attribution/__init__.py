"""Who holds a device: from processes, tags and schedulers to owners."""
