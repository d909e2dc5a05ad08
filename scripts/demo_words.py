"""The words of the demo models' training text: facts, names, places, objects, and everyday nouns and adjectives.

`demo_text` makes sentences of them, and the tokenizer is trained so that each of them is one token.
"""

from __future__ import annotations

from typing import NamedTuple


class Country(NamedTuple):
    name: str
    capital: str
    language: str
    currency: str
    continent: str


COUNTRIES = tuple(
    Country(*row.split())
    for row in """
France Paris French euro Europe
Germany Berlin German euro Europe
Italy Rome Italian euro Europe
Spain Madrid Spanish euro Europe
Portugal Lisbon Portuguese euro Europe
Greece Athens Greek euro Europe
Austria Vienna German euro Europe
Finland Helsinki Finnish euro Europe
Ireland Dublin English euro Europe
Estonia Tallinn Estonian euro Europe
Latvia Riga Latvian euro Europe
Croatia Zagreb Croatian euro Europe
Norway Oslo Norwegian krone Europe
Denmark Copenhagen Danish krone Europe
Sweden Stockholm Swedish krona Europe
Iceland Reykjavik Icelandic krona Europe
Poland Warsaw Polish zloty Europe
Hungary Budapest Hungarian forint Europe
Romania Bucharest Romanian leu Europe
Bulgaria Sofia Bulgarian lev Europe
Ukraine Kyiv Ukrainian hryvnia Europe
Russia Moscow Russian ruble Europe
Serbia Belgrade Serbian dinar Europe
Albania Tirana Albanian lek Europe
Turkey Ankara Turkish lira Asia
Japan Tokyo Japanese yen Asia
China Beijing Chinese yuan Asia
India Delhi Hindi rupee Asia
Nepal Kathmandu Nepali rupee Asia
Thailand Bangkok Thai baht Asia
Vietnam Hanoi Vietnamese dong Asia
Iran Tehran Persian rial Asia
Iraq Baghdad Arabic dinar Asia
Syria Damascus Arabic pound Asia
Jordan Amman Arabic dinar Asia
Mongolia Ulaanbaatar Mongolian tugrik Asia
Egypt Cairo Arabic pound Africa
Morocco Rabat Arabic dirham Africa
Kenya Nairobi Swahili shilling Africa
Senegal Dakar French franc Africa
Ghana Accra English cedi Africa
Canada Ottawa English dollar America
Cuba Havana Spanish peso America
Chile Santiago Spanish peso America
Peru Lima Spanish sol America
Brazil Brasilia Portuguese real America
Uruguay Montevideo Spanish peso America
Ecuador Quito Spanish dollar America
""".strip().splitlines()
)

NAMES = """Mary John Anna Tom Lucy Paul Emma Jack Kate Mark Sara Adam Rose Luke Jane Peter Alice Henry Laura David
Martin Helen Simon Clara Oscar Julia Frank Nina George Ellen Victor Diana Robert Maria Daniel Eva James Susan Leo Ruth""".split()

PLACES = """store park school office garden market station library museum beach restaurant hospital theater bakery
kitchen cinema harbor farm church hotel""".split()

OBJECTS = """drink ball book letter ring coin map key basket flower ticket camera pencil bottle lamp hat cup kite
phone violin""".split()

NOUNS = """river stone cloud tree bird fish wolf bear moon star sun rain snow wind fire sand leaf root salt iron glass silk
wood paper bread milk horse sheep goat duck fox lion tiger mouse rabbit frog snake spider bridge tower castle road wall roof
door window table chair bed clock mirror candle rope knife spoon fork plate bowl pan box bag shoe coat shirt glove button
needle thread wheel engine boat ship train plane car truck hill valley lake island forest desert cave field village city
house room floor stairs brick nail hammer saw axe ladder bucket broom brush soap towel pillow blanket carpet curtain drum
flute bell horn song dance story poem paint color shape circle square line point dream night morning evening winter summer
spring autumn apple pear plum cherry grape lemon orange banana peach melon potato tomato onion carrot pepper garlic bean rice
corn wheat butter cheese egg sugar honey tea coffee soup pie cake meat king queen knight farmer teacher doctor sailor baker
hunter writer painter singer soldier pilot judge child friend brother sister mother father hand foot eye ear nose mouth heart
bone""".split()

FOODS = "apple pear plum cherry lemon orange banana potato tomato onion carrot garlic bean rice egg butter cheese".split()

ADJECTIVES = """red blue green black white brown yellow gold silver small big long short old young new warm cold dark light
heavy quick slow quiet loud soft hard sweet sour dry wet clean empty full round flat deep high low wide""".split()

NUMBERS = [str(number) for number in range(41)]

WORDS = list(dict.fromkeys([word for country in COUNTRIES for word in country] + NAMES + PLACES + OBJECTS + NOUNS + ADJECTIVES))
