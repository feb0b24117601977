"""The look of a report: light and dark, from a phone to a wide screen, in print."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --quiet: #57606a; --line: #d8dee4; --link: #0a58a8;
  --good: #0b5d43; --good-back: #dcf3ea; --warn: #7a4b00; --warn-back: #fdf0d2; --bad: #9b2c0d; --bad-back: #fde4dc;
  --none-back: #e9ecef; --focus: #0a58a8; --zebra: #f6f7f9; --lighter: 0%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --text: #e6e9ec; --quiet: #a3acb5; --line: #363c44; --link: #7dbcff;
    --good: #8fe3c2; --good-back: #123d2f; --warn: #f6cf85; --warn-back: #46330c; --bad: #ffb39b; --bad-back: #54210f;
    --none-back: #2d333a; --focus: #7dbcff; --zebra: #22272d; --lighter: 40%;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: break-word;
}
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .1rem 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 .75rem; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 1.25rem 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: var(--link); }
.kicker { color: var(--quiet); margin: 0; font-size: .9rem; }
.lead { font-size: 1.1rem; }
ul.lead { padding-left: 1.2rem; margin: 0 0 1rem; }
.quiet, .files, figcaption .files { color: var(--quiet); font-size: .86em; }
.order { list-style: none; margin: 0 0 1rem; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; }
.order .name { display: inline-flex; align-items: baseline; max-width: 100%; overflow-wrap: anywhere; }
.swipe { display: none; }
.skip { position: absolute; left: -999rem; top: 0; background: var(--card); padding: .6rem 1rem; z-index: 9; }
.skip:focus { left: .5rem; top: .5rem; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
main:focus { outline: none; }
nav ul { list-style: none; margin: 1rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
nav a { display: inline-block; padding: .25rem 0; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.4rem 1.5rem; margin: 1.4rem 0; scroll-margin-top: 1rem;
}
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-top: 4px solid var(--accent); border-radius: 8px; padding: .8rem 1rem; }
.card { border-top-color: color-mix(in srgb, white var(--lighter), var(--accent)); }
.card h3 { margin: 0 0 .2rem; }
.card p { margin: 0 0 .5rem; }
.card ul { list-style: none; margin: .3rem 0 0; padding: 0; }
.card li {
  display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .6rem; padding: .28rem 0;
  border-top: 1px solid var(--line);
}
.card .organ { flex: 1 1 6rem; min-width: 0; overflow-wrap: anywhere; }
.card .numbers { font-variant-numeric: tabular-nums; text-align: right; min-width: 5.6rem; margin-left: auto; }
@media (max-width: 30rem) {
  .card .numbers { min-width: 2.4rem; }
}
.big { font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .45em; vertical-align: -.06em; flex: none;
  border-radius: 2px; border: 1px solid #55555599;
}
.mark { margin-right: .4em; background: #fff; border-radius: 4px; padding: 0 .22em; font-size: .85em; }
.chip {
  display: inline-block; padding: 0 .55em; border-radius: 1em; font-size: .85em; font-weight: 600; white-space: nowrap;
}
.good { color: var(--good); background: var(--good-back); }
.warn { color: var(--warn); background: var(--warn-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.none { color: var(--quiet); background: var(--none-back); }
.missing { border-left: 4px solid var(--line); padding: .15rem 0 .15rem .8rem; color: var(--quiet); }
.cards + p { margin-top: .9rem; }
.side { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.side > * { flex: 0 1 auto; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .2rem 0 .6rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; color: var(--text); }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom-width: 2px; font-weight: 600; white-space: normal; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; white-space: normal; }
tbody th, thead th { background: var(--card); }
tbody tr:nth-child(even) > * { background: var(--zebra); }
table.text td, table.text th { text-align: left; }
th .name, td .name { white-space: nowrap; }
td small, th small { color: var(--quiet); font-weight: 400; }
figure { margin: 1.2rem 0 1.6rem; }
figure .scroll { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figure img { height: auto; display: block; margin: 0 auto; }
figcaption { margin-top: .5rem; max-width: 46rem; font-size: .95rem; }
details { border-top: 1px solid var(--line); padding: .3rem 0; margin-top: .4rem; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; color: var(--link); }
dl { margin: 0; }
dt { font-weight: 600; }
dd { margin: 0 0 .55rem; max-width: 46rem; }
pre {
  overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
footer { color: var(--quiet); font-size: .88rem; padding-bottom: 2.5rem; }
@media (max-width: 34rem) {
  header, main, footer { padding-left: .7rem; padding-right: .7rem; }
  section { padding: 1rem .9rem; border-radius: 8px; margin: 1rem 0; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .34rem .5rem; }
  table.text tbody th, table.text thead th:first-child { position: static; }
  .swipe { display: inline; color: var(--link); }
}
@media print {
  body { background: #fff; color: #000; }
  nav, .skip { display: none; }
  section { border: 0; padding: 0; break-inside: auto; }
  figure, .card { break-inside: avoid; }
  figure img { width: 100% !important; min-width: 0 !important; }
}
"""
