"""From systems to evidence: sweep → metrics with intervals → findings, figures, pages.

`report.evaluate` tells the story: `protocol` builds a `Sweep` from the YAML of `diverse-cfg evaluate`, and `systems`
says what is compared; `generations` samples the clips and `cache` keeps them; `features` computes what is expensive
once, `metrics` turns it into numbers, `results` holds them with their intervals and `levels` splits them.
`signatures` and `figures` show what they say, and `report` writes the pages.
"""
