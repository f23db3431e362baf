//! The console in a real browser: what it shows, to whom, and what it never does.

#[path = "console/world.rs"]
mod world;

use offshoot_platform::browser::{Browser, Tab};
use offshoot_platform::root;
use serde_json::Value;
use world::{World, train};

/// What a tenant might call a session to act in an operator's browser.
const HOSTILE: &str = "<img src=x onerror=\"window.hacked=1\">\"'><script>window.hacked=1</script>";

fn sign_in(tab: &mut Tab, token: &str) {
    tab.until("!document.getElementById('sign-in').hidden");
    tab.click("#token");
    tab.write(token);
    tab.press("Enter");
}

/// Waits until the page shows data that were made after now.
fn until_fresh(tab: &mut Tab) {
    let seen = tab.eval("Number(document.body.dataset.updates ?? 0)").as_u64().unwrap();
    // The one that is under way may be older.
    tab.until(&format!("Number(document.body.dataset.updates ?? 0) >= {}", seen + 2));
}

/// The server's own word, asked for beside the page.
fn overview(tab: &mut Tab) -> Value {
    tab.eval(
        "fetch('api/overview?since=0', { headers: { authorization: \
         'Bearer ' + sessionStorage.getItem('offshoot-token') } }).then((answer) => answer.json())",
    )
}

/// Nothing was asked for elsewhere, and nothing went wrong, except calls without a valid token: so many.
fn check_manners(tab: &mut Tab, world: &World, n_refused: usize) {
    for url in tab.requests() {
        assert!(url.starts_with(&world.http) || url == "about:blank", "the page asked for {url}");
        assert!(!url.contains("ofs_"), "a token is in an address");
    }
    let complaints = tab.complaints();
    let (refused, wrong): (Vec<_>, Vec<_>) = complaints
        .into_iter()
        .partition(|text| text.contains("api/overview") && text.contains("401"));
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(refused.len(), n_refused, "{refused:#?}");
    assert_eq!(tab.eval("window.hacked === undefined"), true);
    assert_eq!(
        tab.eval("document.querySelectorAll('main img, main script, dialog img').length"),
        0
    );
}

/// A row's cells by the names of their columns.
fn row(tab: &mut Tab, id: &str) -> Value {
    tab.eval(&format!(
        "(() => {{ const heads = [...document.querySelectorAll('#heads th')].map((th) => th.dataset.key); \
         const row = document.querySelector('tr[data-id={id:?}]'); if (!row) return null; \
         return Object.fromEntries([...row.children].map((cell, i) => \
         [heads[i], (heads[i] === 'name' ? cell.querySelector('bdi') : cell).textContent])); }})()"
    ))
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

#[test]
fn an_operator_sees_what_the_server_says_and_names_stay_text() {
    let world = World::start(&["blue", "red", "ops"]);
    world.runtime.block_on(async {
        for (tenant, name, rank, loss) in [
            ("blue", "support", 4, Some(2.5)),
            ("blue", "quiet", 2, None),
            ("red", HOSTILE, 8, Some(1.25)),
        ] {
            let client = world.client(tenant).await;
            let h = client.describe().await.unwrap().hidden_size;
            let session = world.open(&client, name, rank).await;
            train(&session, h, 3, loss).await;
            session.snapshot().await.unwrap();
            train(&session, h, 2, loss).await;
        }
    });
    let mut browser = Browser::start();
    let mut tab = browser.tab();
    tab.open(&world.http);
    tab.until("!document.getElementById('sign-in').hidden");
    // Nothing of the server is known yet.
    assert_eq!(tab.text("document.getElementById('model').textContent"), "");
    sign_in(&mut tab, "ofs_wrong_token");
    tab.until("document.getElementById('sign-in-said').textContent.includes('does not accept')");
    sign_in(&mut tab, &world.token("ops"));
    tab.until("document.querySelectorAll('#rows tr').length === 3");
    until_fresh(&mut tab);
    let told = overview(&mut tab);
    assert_eq!(told["is_operator"], true);
    let sessions = told["sessions"].as_array().unwrap().clone();
    assert_eq!(sessions.len(), 3);
    for one in &sessions {
        let info = &one["info"];
        let shown = row(&mut tab, info["session_id"].as_str().unwrap());
        assert_eq!(shown["name"], info["name"]);
        assert_eq!(shown["tenant"], one["tenant"]);
        assert_eq!(shown["rank"], info["lora"]["r"].to_string());
        assert_eq!(shown["step"], thousands(info["step"].as_u64().unwrap()));
        assert_eq!(info["step"], 5);
        assert_eq!(one["durable_step"], 3);
        assert_eq!(shown["durable"], "step 3");
        let state = shown["state"].as_str().unwrap();
        let words = [info["state"].as_str().unwrap(), "training"];
        assert!(words.iter().any(|word| state.starts_with(word)), "{state}");
        match one["shared_loss"].as_f64() {
            Some(loss) => assert_eq!(shown["loss"], format!("{loss:.4}")),
            None => assert_eq!((&shown["loss"], &info["name"]), (&"–".into(), &"quiet".into())),
        }
    }
    let server = &told["server"];
    assert_eq!(
        tab.text("document.getElementById('model').textContent"),
        server["trunk"]["model_name"]
    );
    assert!(
        tab.text("document.getElementById('held').textContent").contains("Layers 1–2 of 4 on cpu")
    );
    assert_eq!(tab.text("document.getElementById('health').textContent"), "serving");
    // The wrong token is among the refusals, with the number that its user would quote.
    let refusals = tab.text("document.getElementById('refusal-rows').textContent");
    let id = told["refusals"][0]["request_id"].as_str().unwrap();
    assert!(refusals.contains("unauthenticated") && refusals.contains(id), "{refusals}");
    // The hostile name, in full size.
    let hostile = sessions.iter().find(|one| one["info"]["name"] == HOSTILE).unwrap();
    let id = hostile["info"]["session_id"].as_str().unwrap();
    tab.click(&format!("tr[data-id=\"{id}\"] a"));
    tab.until("document.getElementById('detail').open");
    tab.until("document.querySelectorAll('#detail tbody tr').length > 0");
    assert_eq!(tab.text("document.getElementById('detail-title').textContent"), HOSTILE);
    let detail = tab.text("document.getElementById('detail').innerText");
    let used = &hostile["metering"];
    for expected in [
        thousands(used["tokens"].as_u64().unwrap()),
        id.to_string(),
        format!("{}", hostile["info"]["lora"]["lora_alpha"].as_f64().unwrap()),
        "client".into(),
    ] {
        assert!(detail.contains(&expected), "{expected} is not in {detail}");
    }
    assert_eq!(used["tokens"], 40);
    check_manners(&mut tab, &world, 2);
}

#[test]
fn a_tenant_sees_nothing_of_another_and_leaves_nothing_behind() {
    let mut world = World::start(&["blue", "red"]);
    world.runtime.block_on(async {
        for (tenant, name) in [("blue", "mine"), ("red", "secret-plans")] {
            let client = world.client(tenant).await;
            let h = client.describe().await.unwrap().hidden_size;
            let session = world.open(&client, name, 2).await;
            train(&session, h, 2, Some(1.5)).await;
        }
    });
    let mut browser = Browser::start();
    let mut tab = browser.tab();
    tab.open(&world.http);
    sign_in(&mut tab, &world.token("blue"));
    tab.until("document.querySelectorAll('#rows tr').length === 1");
    until_fresh(&mut tab);
    let told = overview(&mut tab).to_string();
    let page = tab.text("document.documentElement.outerHTML");
    for text in [&told, &page] {
        assert!(
            text.contains("mine") && !text.contains("secret") && !text.contains("red\""),
            "{text}"
        );
    }
    // No queue, no device, no one else's memory: a tenant has three cards.
    assert_eq!(tab.eval("document.querySelectorAll('.card').length"), 3);
    // Signed out, nothing of it is left in the page, and a fresh one asks again.
    tab.click("#sign-out");
    tab.until(
        "document.getElementById('sign-in')?.hidden === false && !document.body.textContent.includes('mine')",
    );
    assert_eq!(tab.eval("sessionStorage.getItem('offshoot-token')"), Value::Null);
    sign_in(&mut tab, &world.token("red"));
    tab.until("document.querySelectorAll('#rows tr').length === 1");
    assert!(!tab.text("document.body.textContent").contains("mine"));
    check_manners(&mut tab, &world, 2);
    // A server that is gone is told of, and what was shown stays.
    world.kill();
    tab.until("document.getElementById('notice').textContent.startsWith('No answer since')");
    assert_eq!(tab.eval("document.querySelectorAll('#rows tr').length"), 1);
}

#[test]
fn sessions_are_pinned_evicted_and_deleted_by_hand() {
    let world = World::start(&[]);
    let session = world.runtime.block_on(async {
        let client = world.client("").await;
        let h = client.describe().await.unwrap().hidden_size;
        let session = world.open(&client, "worked-on", 2).await;
        for _ in 0..3 {
            train(&session, h, 1, None).await;
            session.snapshot().await.unwrap();
        }
        session
    });
    let mut browser = Browser::start();
    let mut tab = browser.tab();
    tab.prefer("dark");
    tab.open(&world.http);
    tab.until("document.querySelectorAll('#rows tr').length === 1");
    assert_eq!(tab.eval("document.getElementById('sign-out').hidden"), true);
    // By keyboard: the link of the row, then the sheet, then back to the link.
    tab.eval("document.querySelector('#rows a').focus()");
    tab.press("Enter");
    tab.until("document.getElementById('detail').open");
    tab.press("Escape");
    tab.until("!document.getElementById('detail').open");
    tab.until("document.activeElement === document.querySelector('#rows a')");
    tab.press("Enter");
    tab.until("document.querySelectorAll('#detail tbody tr').length > 2");
    let info = "async (what) => (await (await fetch('api/overview?since=0')).json()).sessions[0]";
    let press = |tab: &mut Tab, text: &str| {
        let find = format!(
            "(() => {{ const all = [...document.querySelectorAll('#detail button')]; \
             all.forEach((one) => one.removeAttribute('data-test')); \
             const one = all.find((one) => one.textContent === {text:?} && one.checkVisibility() && !one.disabled); \
             one?.setAttribute('data-test', ''); return one !== undefined; }})()"
        );
        tab.until(&find);
        tab.click("#detail button[data-test]");
    };
    press(&mut tab, "Pin to the device");
    tab.until(&format!("({info})().then((one) => one.pinned)"));
    tab.until("document.querySelector('#rows .pin:not(.unset)') !== null");
    press(&mut tab, "Unpin");
    tab.until(&format!("({info})().then((one) => !one.pinned)"));
    let n_snapshots = "fetch('api/sessions/' + document.querySelector('#rows tr').dataset.id + '/snapshots')\
                       .then((answer) => answer.json()).then((answer) => answer.snapshots.length)";
    let before = tab.eval(n_snapshots).as_u64().unwrap();
    press(&mut tab, "Delete");
    tab.until(&format!("{n_snapshots}.then((n) => n === {})", before - 1));
    tab.until(&format!("document.querySelectorAll('#detail tbody tr').length === {}", before - 1));
    press(&mut tab, "Take off the device");
    tab.until(&format!("({info})().then((one) => one.info.residency === 'disk')"));
    tab.until("document.querySelector('#rows .state').textContent.includes('on disk')");
    // Deleting asks once more; no is no.
    press(&mut tab, "Delete…");
    press(&mut tab, "Keep it");
    assert_eq!(tab.eval("document.querySelectorAll('#rows tr').length"), 1);
    press(&mut tab, "Delete…");
    press(&mut tab, "Delete it");
    tab.until("document.querySelectorAll('#rows tr').length === 0");
    tab.until("!document.getElementById('detail').open");
    assert!(
        tab.text("document.getElementById('no-sessions').innerText").contains("No sessions yet")
    );
    check_manners(&mut tab, &world, 0);
    drop(session);
}

#[test]
fn many_sessions_are_found_sorted_and_stay_where_they_are() {
    const N: usize = 120;
    let world = World::start(&[]);
    let _sessions = world.runtime.block_on(async {
        let client = world.client("").await;
        let mut sessions = Vec::new();
        for i in 0..N {
            sessions
                .push(world.open(&client, &format!("session-{i:03}"), 1 + (i % 4) as u32).await);
        }
        sessions
    });
    let mut browser = Browser::start();
    let mut tab = browser.tab();
    tab.open(&world.http);
    tab.until("document.querySelectorAll('#rows tr').length === 50");
    assert_eq!(tab.text("document.getElementById('page-text').textContent"), "1–50 of 120");
    let first = "document.querySelector('#rows bdi').textContent";
    tab.click("th[data-key=name] button");
    tab.leave();
    tab.until(&format!("{first} === 'session-000'"));
    tab.click("th[data-key=name] button");
    tab.leave();
    tab.until(&format!("{first} === 'session-119'"));
    assert_eq!(tab.text("document.querySelector('th[data-key=name]').ariaSort"), "descending");
    tab.click("#after");
    tab.click("#after");
    tab.until("document.querySelectorAll('#rows tr').length === 20");
    tab.click("#search");
    tab.write("ION-07");
    tab.until("document.querySelectorAll('#rows tr').length === 10");
    assert_eq!(tab.text("document.getElementById('n-sessions').textContent"), "10 of 120");
    tab.eval("document.getElementById('search').select()");
    tab.write("nothing like it");
    tab.until("document.getElementById('no-sessions').textContent === 'No session fits.'");
    tab.eval("document.getElementById('search').select()");
    tab.write("session");
    tab.until("document.querySelectorAll('#rows tr').length === 50");
    // Updates leave the focus, the scroll and the rows themselves alone.
    tab.eval("window.held = document.querySelectorAll('#rows a')[40]; held.focus(); held.scrollIntoView()");
    let place = tab.eval("Math.round(window.scrollY)");
    until_fresh(&mut tab);
    until_fresh(&mut tab);
    assert_eq!(tab.eval("document.activeElement === held && held.isConnected"), true);
    assert_eq!(tab.eval("Math.round(window.scrollY)"), place);
    assert_eq!(tab.eval("document.querySelectorAll('#rows a')[40] === held"), true);
    check_manners(&mut tab, &world, 0);
}

/// The contrast of a text with what is behind it, by WCAG's formula.
const CONTRAST: &str = "(selector) => { const element = document.querySelector(selector); \
    const parse = (text) => { const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true }); \
      context.fillStyle = text; context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data]; }; \
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255) \
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)) \
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0); \
    let behind = element; \
    while (parse(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement; \
    const style = getComputedStyle(element); \
    const ink = style.fill !== 'rgb(0, 0, 0)' ? style.fill : style.color; \
    const pair = [light(parse(ink)), light(parse(getComputedStyle(behind).backgroundColor))].sort(); \
    return (pair[1] + 0.05) / (pair[0] + 0.05); }";

#[test]
fn it_is_readable_on_a_phone_by_day_and_by_night() {
    let world = World::start(&["blue", "red", "ops"]);
    world.runtime.block_on(async {
        for (tenant, name) in
            [("blue", "support"), ("red", "a-very-long-name-without-any-place-to-break-it-at-all")]
        {
            let client = world.client(tenant).await;
            let h = client.describe().await.unwrap().hidden_size;
            let session = world.open(&client, name, 4).await;
            train(&session, h, 4, Some(2.0)).await;
            session.snapshot().await.unwrap();
        }
    });
    let mut browser = Browser::start();
    let mut tab = browser.tab();
    let narrow = |tab: &mut Tab, what: &str| {
        let wide = tab.eval("document.documentElement.scrollWidth").as_u64().unwrap();
        assert!(wide <= 360, "{what} is {wide} wide on a phone of 360");
    };
    tab.resize(360, 740);
    tab.prefer("light");
    tab.open(&world.http);
    tab.until("!document.getElementById('sign-in').hidden");
    narrow(&mut tab, "the form");
    sign_in(&mut tab, &world.token("ops"));
    tab.until("document.querySelectorAll('#rows tr').length === 2");
    narrow(&mut tab, "the page");
    for scheme in ["light", "dark"] {
        tab.prefer(scheme);
        let background = "getComputedStyle(document.body).backgroundColor";
        let dark = tab.text(background) == "rgb(16, 20, 18)";
        assert_eq!(dark, scheme == "dark", "{}", tab.text(background));
        for text in [
            "h1",
            "#held",
            ".facts dt",
            ".note",
            ".tick",
            "#rows a",
            ".under",
            "thead button",
            "#health",
            "#refusals-title",
        ] {
            let contrast = tab.eval(&format!("({CONTRAST})({text:?})")).as_f64().unwrap();
            println!("{scheme} {text} {contrast:.1}");
            assert!(contrast >= 4.5, "{text} has a contrast of {contrast:.2} in {scheme}");
        }
    }
    // The switch wins over the system: auto, light, dark.
    tab.click("#theme");
    tab.until("document.documentElement.dataset.theme === 'light'");
    assert_eq!(tab.text("getComputedStyle(document.body).backgroundColor"), "rgb(246, 246, 242)");
    tab.click("#rows a");
    tab.until("document.querySelectorAll('#detail tbody tr').length > 0");
    narrow(&mut tab, "the sheet");
    let sheet = tab.eval("document.getElementById('detail').scrollWidth").as_u64().unwrap();
    assert!(sheet <= 360, "the sheet's inside is {sheet} wide");
    tab.press("Escape");
    // Charts can be read by keyboard, value by value.
    tab.eval("document.querySelector('.plot').focus()");
    tab.until("(document.querySelector('.plot polyline') ?? null) !== null");
    tab.press("ArrowLeft");
    tab.until("/ at \\d\\d:\\d\\d:\\d\\d: Tokens/.test(document.querySelector('.plot').ariaLabel)");
    assert_eq!(tab.eval("document.querySelector('.tip').hidden"), false);
    check_manners(&mut tab, &world, 1);
    if let Some(folder) = std::env::var_os("OFFSHOOT_PICTURES") {
        tab.picture(&root().join(folder).join("phone.png"));
    }
}
