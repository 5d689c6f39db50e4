"""Finds and reads what a user names: files, Hub repositories, and objects by import path.

Files are read within size limits, and text from them is made safe to print.
"""
