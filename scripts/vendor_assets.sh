#!/bin/sh
# Fetches the fonts, icons and Bootstrap's CSS from npm into assets/vendor, at the versions named here. The results are committed:
# run this only to change a version. Licences: Inter and JetBrains Mono OFL-1.1, Bootstrap MIT, Lucide ISC.
set -eu
cd "$(dirname "$0")/.."
out=assets/vendor
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm init -y >/dev/null && npm install --silent bootstrap@5.3.8 @fontsource-variable/inter@5.3.0 \
    @fontsource-variable/jetbrains-mono@5.3.0 lucide-static@1.62.0)
modules=$work/node_modules
mkdir -p "$out/fonts" "$out/icons" "$out/licences"
# The last line names a source map that is not vendored; a browser's tools would ask for it.
sed '/sourceMappingURL/d' "$modules/bootstrap/dist/css/bootstrap.min.css" >"$out/bootstrap.min.css"
for range in latin latin-ext cyrillic greek; do
    cp "$modules/@fontsource-variable/inter/files/inter-$range-wght-normal.woff2" "$out/fonts/"
    cp "$modules/@fontsource-variable/jetbrains-mono/files/jetbrains-mono-$range-wght-normal.woff2" "$out/fonts/"
done
cp "$modules/bootstrap/LICENSE" "$out/licences/bootstrap.txt"
cp "$modules/@fontsource-variable/inter/LICENSE" "$out/licences/inter.txt"
cp "$modules/@fontsource-variable/jetbrains-mono/LICENSE" "$out/licences/jetbrains-mono.txt"
cp "$modules/lucide-static/LICENSE" "$out/licences/lucide.txt"
# components/icons.py is the list of icons; their CSS is written from it.
names=$(python3 -c 'import re; print(*re.findall(r"\"([a-z0-9-]+)\"", re.search(r"ICONS = \((.*?)\)", open("components/icons.py").read(), re.S)[1]))')
rm -f "$out"/icons/*.svg
echo "/* Written by scripts/vendor_assets.sh from components/icons.py. */" >assets/icons.css
for name in $names; do
    cp "$modules/lucide-static/icons/$name.svg" "$out/icons/"
    echo ".icon-$name { --icon: url(/assets/vendor/icons/$name.svg); }" >>assets/icons.css
done

# The @font-face rules of the ranges above, with their paths.
{
    echo "/* Written by scripts/vendor_assets.sh. */"
    cat "$modules/@fontsource-variable/inter/wght.css" "$modules/@fontsource-variable/jetbrains-mono/wght.css" |
        python3 -c 'import re, sys
for face in re.findall(r"@font-face \{.*?\}", sys.stdin.read(), re.S):
    name = re.search(r"files/([a-z-]+-(latin-ext|latin|cyrillic|greek)-wght-normal\.woff2)", face)
    if name and "cyrillic-ext" not in name[1] and "greek-ext" not in name[1]:
        print(re.sub(r"url\(.*?\)", f"url(/assets/vendor/fonts/{name[1]})", face))'
} >assets/fonts.css
