"""Words that tasks hide, list and count: plain English nouns and adjectives, none twice."""

from __future__ import annotations

_NOUNS_TEXT = """
apple arrow bag ball bank basket beach bean bell bird boat bone book boot bottle bowl box bread brick bridge
brush bucket bus button cake camera candle card cart castle cat chain chair cheese chest clock cloud coat
coin comb corn cow crown cup curtain desk dog door dress drum duck eagle ear egg engine farm feather fence
field fire fish flag flower fork fox frog fruit garden gate glass glove goat gold grape grass hammer hat
hill honey horse house island jacket jar key king kite knife ladder lake lamp leaf lemon letter lion lock
map market meat milk mirror moon mountain mouse nail needle nest nose nut ocean onion orange oven owl paint
paper park pen pencil piano picture pig pillow pipe plant plate pocket pond potato queen rabbit rain ring
river road rock roof room root rope rose salt sand school sea seed sheep ship shirt shoe shop silver snake
snow soap sock soup spoon star stone stove street sugar sun table tail tea tent tiger tooth tower toy train
tree truck valley wagon wall watch water wheel whistle wind window wing wolf wood wool
"""
NOUNS = tuple(_NOUNS_TEXT.split())
"""Things of everyday life."""

_ADJECTIVES_TEXT = """
big black blue bold brave bright broad brown calm cheap clean clever cold cool dark deep dry dull early easy
fair fast fine flat fresh full gentle giant grand gray great green happy hard heavy high holy hot huge kind
large late light little long loud low lucky mild modern narrow neat new noble odd old pale pink plain proud
pure quick quiet rare red rich rough round royal safe sharp short silent simple slow small smart smooth soft
solid sour square strange strong sweet tall thick thin tiny warm weak wet white wide wild wise yellow young
"""
ADJECTIVES = tuple(_ADJECTIVES_TEXT.split())
"""Qualities that a thing may have."""
