"""HTTP: sending results and files, fetching inputs."""
