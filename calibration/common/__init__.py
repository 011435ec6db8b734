"""What every room uses: files written whole or not at all, documents with errors that say where, progress, memory,
devices.

Nothing here knows of models.
"""
