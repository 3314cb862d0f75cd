"""A blind listening test of what an evaluation measured: `study` writes it and counts the votes, `app` asks on a
local web page, `webmushra` hands it to a web server for many listeners.
"""
