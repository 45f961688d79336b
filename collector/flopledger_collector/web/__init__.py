"""What the collector shows over HTTP: the API's handlers and the pages for people."""
