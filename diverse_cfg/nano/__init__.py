"""The small world that is shipped: what its prompts name (`attributes`), and who tells whether a clip has it.

`rules` need no network, `judge` is a small one that no training reward knows.
"""
