"""What the tests of all pages check alike: hostile text stays text, and nothing is fetched."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--<b>\ud800 {{ 7*7 }}"
EVIL = "<svg/onload=alert(2)>"


def page_data(html: str) -> dict[str, Any]:
    """The data that the page hands to its script."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


def check_that_nothing_is_fetched(page: Path) -> None:
    """The page needs only the file beside it and runs only its own script."""
    html = page.read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", html)
    assert "plotly.min.js" in links
    assert not [link for link in links if ":" in link or link.startswith("/")]
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html and "url(" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    own = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert policy and len(own) == 1 and "default-src &#39;none&#39;" in policy.group(1)
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    assert digest in policy.group(1)
    assert (page.parent / "plotly.min.js").is_file() and "innerHTML" not in html
