//! A real browser without a window, driven by its own protocol (DevTools over a WebSocket).

use crate::tool;
use serde_json::{Value, json};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tungstenite::{Message, WebSocket};

const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(30);

/// Chromium. Dropped, it is killed.
pub struct Browser {
    process: Child,
    address: String,
    line: Line,
    _profile: tempfile::TempDir,
}

/// One page that is open.
pub struct Tab {
    line: Line,
}

/// A connection to the browser, or to one of its pages.
struct Line {
    socket: WebSocket<TcpStream>,
    n_calls: u64,
    events: Vec<Value>,
}

impl Line {
    fn connect(url: &str) -> Line {
        let address = url.trim_start_matches("ws://").split('/').next().expect("an address");
        let stream = TcpStream::connect(address).expect("the browser listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("it can be set");
        let (socket, _) = tungstenite::client(url, stream).expect("it speaks WebSocket");
        Line { socket, n_calls: 0, events: Vec::new() }
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.try_call(method, params).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    fn try_call(&mut self, method: &str, params: Value) -> Result<Value, Value> {
        self.n_calls += 1;
        let call = json!({ "id": self.n_calls, "method": method, "params": params });
        self.socket.send(Message::text(call.to_string())).expect("the browser reads");
        loop {
            let message = self.socket.read().unwrap_or_else(|error| panic!("{method}: {error}"));
            let Message::Text(text) = message else { continue };
            let mut message: Value = serde_json::from_str(&text).expect("it speaks JSON");
            if message["id"] == self.n_calls {
                return match message["error"].take() {
                    Value::Null => Ok(message["result"].take()),
                    error => Err(error),
                };
            }
            self.events.push(message);
        }
    }
}

impl Browser {
    /// Starts one with an empty profile.
    pub fn start() -> Browser {
        let profile = tempfile::tempdir().expect("a folder");
        let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
                     --disable-background-networking --disable-component-update --disable-sync \
                     --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0";
        let process = Command::new(tool("chromium"))
            .args(flags.split_whitespace())
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the browser starts");
        let file = profile.path().join("DevToolsActivePort");
        let begun = Instant::now();
        let (port, path) = loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if let Some((port, path)) = text.split_once('\n').filter(|(_, path)| !path.is_empty()) {
                break (port.to_string(), path.trim().to_string());
            }
            assert!(begun.elapsed() < PATIENCE, "the browser does not say where it listens");
            std::thread::sleep(PAUSE);
        };
        let address = format!("ws://127.0.0.1:{port}");
        let line = Line::connect(&format!("{address}{path}"));
        Browser { process, address, line, _profile: profile }
    }

    /// A page of its own, with nothing of others' storage.
    pub fn tab(&mut self) -> Tab {
        let context = self.line.call("Target.createBrowserContext", json!({}));
        let wanted =
            json!({ "url": "about:blank", "browserContextId": context["browserContextId"] });
        let target = self.line.call("Target.createTarget", wanted);
        let id = target["targetId"].as_str().expect("a name").to_string();
        let mut line = Line::connect(&format!("{}/devtools/page/{id}", self.address));
        for domain in ["Page", "Runtime", "Network", "Log"] {
            line.call(&format!("{domain}.enable"), json!({}));
        }
        let mut tab = Tab { line };
        tab.resize(1280, 900);
        tab
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Tab {
    /// Goes there, and waits until the page is loaded.
    pub fn open(&mut self, url: &str) {
        let answer = self.line.call("Page.navigate", json!({ "url": url }));
        assert!(answer["errorText"].is_null(), "{url}: {}", answer["errorText"]);
        self.until("document.readyState === 'complete'");
    }

    /// The value of an expression, or of what it promises.
    pub fn eval(&mut self, expression: &str) -> Value {
        self.try_eval(expression).unwrap_or_else(|error| panic!("{expression}: {error}"))
    }

    /// An error: the page went before it could answer.
    fn try_eval(&mut self, expression: &str) -> Result<Value, Value> {
        let wanted = json!({
            "expression": expression, "awaitPromise": true, "returnByValue": true,
        });
        let mut answer = self.line.try_call("Runtime.evaluate", wanted)?;
        let failed = &answer["exceptionDetails"];
        assert!(failed.is_null(), "{expression}: {failed}");
        Ok(answer["result"]["value"].take())
    }

    /// The text of an expression.
    pub fn text(&mut self, expression: &str) -> String {
        let value = self.eval(expression);
        value.as_str().unwrap_or_else(|| panic!("{expression} is {value}")).to_string()
    }

    /// Until the expression is true, be it of the next page.
    pub fn until(&mut self, expression: &str) {
        let begun = Instant::now();
        while self.try_eval(expression) != Ok(Value::Bool(true)) {
            if begun.elapsed() > PATIENCE {
                let seen = self.text("document.body.innerText");
                panic!("{expression} did not become true; the page says:\n{seen}");
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// The window's size in CSS pixels; a narrow one is a phone's.
    pub fn resize(&mut self, width: u32, height: u32) {
        let wanted = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.line.call("Emulation.setDeviceMetricsOverride", wanted);
    }

    /// Which colours the system prefers: `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let features = json!([
            { "name": "prefers-color-scheme", "value": scheme },
            { "name": "prefers-reduced-motion", "value": "reduce" },
        ]);
        self.line.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Presses the mouse where the first element that fits is, as a person would.
    pub fn click(&mut self, selector: &str) {
        let place = self.eval(&format!(
            "(() => {{ const element = document.querySelector({selector:?}); \
             if (!element) return null; element.scrollIntoView({{ block: 'center' }}); \
             const box = element.getBoundingClientRect(); \
             return {{ x: box.x + box.width / 2, y: box.y + box.height / 2 }}; }})()"
        ));
        assert!(place.is_object(), "there is no {selector}");
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({
                "type": kind, "x": place["x"], "y": place["y"], "button": "left", "clickCount": 1,
            });
            self.line.call("Input.dispatchMouseEvent", event);
        }
    }

    /// The mouse is where nothing is.
    pub fn leave(&mut self) {
        let event = json!({ "type": "mouseMoved", "x": 1, "y": 1 });
        self.line.call("Input.dispatchMouseEvent", event);
    }

    /// Types into what has the focus.
    pub fn write(&mut self, text: &str) {
        self.line.call("Input.insertText", json!({ "text": text }));
    }

    /// Presses a key, such as `Enter`, `Escape` or `Tab`.
    pub fn press(&mut self, key: &str) {
        let code = match key {
            "Enter" => 13,
            "Escape" => 27,
            "Tab" => 9,
            "ArrowLeft" => 37,
            "ArrowRight" => 39,
            other => panic!("no code for {other}"),
        };
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let event = json!({
                "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
                "text": if kind == "keyDown" { text } else { "" },
            });
            self.line.call("Input.dispatchKeyEvent", event);
        }
    }

    /// A picture of the window.
    pub fn picture(&mut self, file: &Path) {
        let answer = self.line.call("Page.captureScreenshot", json!({ "format": "png" }));
        let text = answer["data"].as_str().expect("a picture");
        std::fs::write(file, unbase64(text)).unwrap_or_else(|error| panic!("{file:?}: {error}"));
    }

    /// The addresses of everything that the page asked for.
    pub fn requests(&mut self) -> Vec<String> {
        self.settle();
        let sent = self.line.events.iter().filter(|e| e["method"] == "Network.requestWillBeSent");
        sent.filter_map(|e| e["params"]["request"]["url"].as_str().map(str::to_string)).collect()
    }

    /// What went wrong in the page: exceptions, errors and warnings of the console, and what the
    /// browser logged of it.
    pub fn complaints(&mut self) -> Vec<String> {
        self.settle();
        let of = |event: &Value| {
            let params = &event["params"];
            match event["method"].as_str()? {
                "Runtime.exceptionThrown" => Some(params["exceptionDetails"].to_string()),
                "Runtime.consoleAPICalled" => Some(params["args"].to_string()),
                "Log.entryAdded" => Some(params["entry"].to_string()),
                _ => None,
            }
        };
        self.line.events.iter().filter_map(of).collect()
    }

    /// Until every event of so far is here.
    fn settle(&mut self) {
        self.eval(
            "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(1), 0)))",
        );
    }
}

fn unbase64(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).expect("it is base64")
}
