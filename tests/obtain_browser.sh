#!/bin/sh
# Make sure that the tests find a Chromium with its driver: the live page is tested in a real browser, without a screen.
set -eu

if command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; then
  exit 0
fi

root=""
if [ "$(id -u)" -ne 0 ]; then
  if sudo -n true 2>/dev/null; then root="sudo -n"; else root="no"; fi
fi
if command -v apt-get >/dev/null 2>&1 && [ "$root" != no ]; then
  echo "installing Debian's chromium and its driver"
  if $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; then
    exit 0
  fi
fi

cat >&2 <<'TXT'
The tests of the live page need a Chromium, and none can be had here: install Debian's packages chromium and
chromium-driver, or put `chromium` and `chromedriver` of one version on the PATH.
TXT
exit 1
