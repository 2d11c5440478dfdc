"""What people saw on contact sheets: names that stand for two things, or are one of two, or are wrong."""

from __future__ import annotations

# Names shared by different brands, by a brand and an ordinary thing, or by marks too unlike to be one class.
AMBIGUOUS_LOGOS = frozenset(
    "500 abstract ada affinity ai amp analogue anchor apex apl arc arm asterisk atm atom audio auto awk backbone "
    "bamboo bat beam beats block bnb bolt box brand bridge brush buddy buffer c cake capacitor carbon cashapp "
    "chai chat chromatic circle claudecode cline close cobalt cobol cockpit code compass composer concourse "
    "config convex crown crystal css cube cursor d dart dash data database delicious diaspora discover dot "
    "drizzle drone edge electron element elk equal eraser esphome etcd express falcon fantom file fish flood flow "
    "flower flux folder framework fresh fuel game gemini ghost gin gleam glide glitch grain graphite grav grin "
    "handshake harbor helix hermes hive home http https husky hyper image imba ink insomnia iq just key kick "
    "kirby lens less lighthouse line linear link lock log loom lumen magic mailbox man map markdown max meta "
    "meteor metro microsoft minecraft mix monitor moon music nano neon nimble node note nuke oauth octave odin "
    "org origin ory outline overcast ox passport pay pi pix plane play plex pocket poe poly polygon progress r "
    "radar rails railway rainbow ram ray razor realm reason reasonstudios red reflex remix ring riot ripple rise "
    "rocket rome ruff safe salt san scan settings shell signal slides slim smart snowflake solid spectrum "
    "spotlight square steemit stellar stencil stylus sun sync table target teal terminal test tex text tidal tor "
    "tree treehouse turbo typer v0 vault vector velocity video virtualbox visualstudio vivo wallet wan warp waves "
    "wifi wire wise wix wolfram wxt x xai xml xrp yaml zap zeit zend".split()
)

# Other names of a brand that the sets use side by side.
SAME_BRAND = {
    "adobeaftereffects": "aftereffects", "adobeillustrator": "illustrator", "adobephotoshop": "photoshop",
    "adobexd": "xd", "angularjs": "angular", "aws": "amazonwebservices", "azure": "microsoftazure",
    "chrome": "googlechrome", "eclipseide": "eclipse", "firefoxbrowser": "firefox",
    "golang": "go", "greensock": "gsap", "html5": "html", "microsoftbing": "bing", "microsoftwindows": "windows",
    "nuxtjs": "nuxt", "rollupjs": "rollup", "sinaweibo": "weibo", "travis": "travisci",
    "visualstudiocode": "vscode", "vitejs": "vite", "vuejs": "vue",
}  # fmt: skip

# Territories that some sets give their own flag and others that of the state they belong to.
AMBIGUOUS_FLAGS = frozenset("bl bq bv cp ea gf gp hm mf mq nc pm re sj um wf yt".split())

# '<set>:<icon>' drawings that show something else than the class they would fall into.
WRONG_LOGOS = frozenset(
    "ant-design:appstore-filled ant-design:appstore-outlined ri:flask-fill ri:flask-line uil:flask jam:flask mdi:flask "
    "mdi:flask-outline".split()
)
