"""Finds and reads the inputs that a user names: files, Hub repositories, and importable objects.

Files are read within size limits, and text from them is made safe to print.
"""
