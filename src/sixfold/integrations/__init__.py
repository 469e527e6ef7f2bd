"""Other people's tools, each an extra, imported when it is used."""
