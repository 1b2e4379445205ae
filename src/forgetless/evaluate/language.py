"""Which language a text is in, among those that the prompts ask for; by script, then by its
commonest words.

    language_of("Der Zug fährt um acht.", ["de", "en"])        # 'de'

A rule to judge answers of chat models by, not a general identifier: it knows the languages of our
prompts, and says None where it cannot tell.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# The first word of a letter's Unicode name -> languages written so.
SCRIPTS = {
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "HANGUL": ("ko",),
    "CJK": ("zh",),
    "ARABIC": ("ar",),
    "DEVANAGARI": ("hi",),
    "CYRILLIC": ("ru", "uk"),
}
# Frequent short words that tell languages of one script apart.
FREQUENT = {
    "en": "the of and to in is that for it you with are this on be as your can or have not",
    "de": "der die das und ist nicht ein eine zu mit auf für den dem von sich es ich wie oder",
    "fr": "le la les et est une un des dans pour que qui vous pas sur avec ce au du être",
    "es": "el la los las y es una un en para que con por se del no su como más lo",
    "it": "il la che di e è un una per non con del della sono i gli le nel si come",
    "pt": "o a os as e é um uma para que com não em do da no na por se mais",
    "nl": "de het een en is van niet dat op te voor met zijn je in er ook maar of als",
    "pl": "i w nie jest na się z do że to jak dla o od po ale są przez lub tym",
    "sv": "och är en ett att det som på för med av den inte i har om eller kan du till",
    "tr": "ve bir bu için ile de da çok olan en olarak daha gibi ne kadar ama veya var ya iyi",
    "ru": "и в не на что с это как по для из к он она они мы или ты вы так",
    "uk": "і в не на що з це як для та до він вона вони ми або ви є від які",
}


def language_of(text: str, among: Sequence[str]) -> str | None:
    """The code of the text's language out of `among`; None where no rule tells."""
    scripts = Counter(
        unicodedata.name(letter, "").split(" ")[0] for letter in text if letter.isalpha()
    )
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts.total():
        return "ja" if "ja" in among else None
    script = scripts.most_common(1)[0][0]
    if script in SCRIPTS:
        possible = [code for code in SCRIPTS[script] if code in among]
    else:
        possible = [code for code in among if code in FREQUENT and code not in ("ru", "uk")]
    if script == "CJK":  # without the kana that Japanese has
        return "zh" if "zh" in among else None
    if len(possible) < 2 and script in SCRIPTS:
        return possible[0] if possible else None
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    scores = {code: sum(words[word] for word in FREQUENT[code].split()) for code in possible}
    best = max(scores, key=lambda code: scores[code], default=None)
    return best if best is not None and scores[best] > 0 else None
