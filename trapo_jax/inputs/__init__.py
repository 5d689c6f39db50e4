"""Finds and reads the inputs that a user specifies: files, Hub repositories, and importable objects.

Files are read with size limits, and text from files is made safe to print.
"""
