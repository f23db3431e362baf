//! The console's files, as they were when the program was built.

use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// A file of the page: its path, its type, its text.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! file {
    ($path:literal, $kind:literal) => {
        File { path: $path, kind: $kind, text: include_str!(concat!("page/", $path)) }
    };
}

const FILES: &[File] = &[
    file!("index.html", "text/html; charset=utf-8"),
    file!("console.css", "text/css; charset=utf-8"),
    file!("icon.svg", "image/svg+xml"),
    file!("theme.js", "text/javascript; charset=utf-8"),
    file!("main.js", "text/javascript; charset=utf-8"),
    file!("api.js", "text/javascript; charset=utf-8"),
    file!("cards.js", "text/javascript; charset=utf-8"),
    file!("chart.js", "text/javascript; charset=utf-8"),
    file!("detail.js", "text/javascript; charset=utf-8"),
    file!("dom.js", "text/javascript; charset=utf-8"),
    file!("format.js", "text/javascript; charset=utf-8"),
    file!("refusals.js", "text/javascript; charset=utf-8"),
    file!("sessions.js", "text/javascript; charset=utf-8"),
    file!("shell.js", "text/javascript; charset=utf-8"),
];

/// A file by its path; whoever has it already is told so. None: there is no such file.
pub fn find(path: &str, headers: &HeaderMap) -> Option<Response> {
    let file = FILES.iter().find(|file| file.path == path)?;
    // Of the text alone: another build with the same page need not send it again.
    let tag = format!("\"{}\"", &blake3::hash(file.text.as_bytes()).to_hex()[..16]);
    let known = headers.get(header::IF_NONE_MATCH).and_then(|known| known.to_str().ok());
    // Compressed on its way, it is another representation of the same text: a weak mark.
    let is_known = known.is_some_and(|known| known.split(',').any(|one| one.contains(&tag)));
    let tag = HeaderValue::from_str(&format!("W/{tag}")).expect("hexadecimal");
    let fresh = [
        (header::ETAG, tag),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_TYPE, HeaderValue::from_static(file.kind)),
    ];
    Some(match is_known {
        true => (StatusCode::NOT_MODIFIED, fresh).into_response(),
        false => (fresh, file.text).into_response(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `src="..."`, `href="..."` and `from "..."` name.
    fn named(text: &str) -> Vec<&str> {
        let behind =
            |mark: &'static str| text.split(mark).skip(1).filter_map(|rest| rest.split('"').next());
        [" src=\"", " href=\"", " from \""].into_iter().flat_map(behind).collect()
    }

    #[test]
    fn the_page_is_small_whole_and_names_nothing_outside() {
        let bytes: usize = FILES.iter().map(|file| file.text.len()).sum();
        println!("{bytes} bytes");
        assert!(bytes < 100_000, "the page has {bytes} bytes; it is to be quick on slow links");
        for file in FILES {
            for name in named(file.text) {
                if name.starts_with('#') {
                    continue;
                }
                let name = name.trim_start_matches("./").trim_start_matches("page/");
                let known = FILES.iter().any(|file| file.path == name);
                assert!(known, "{} names {name}, which is no file of the page", file.path);
            }
            let without = file.text.replace("http://www.w3.org/2000/svg", "");
            for outside in ["http://", "https://", "url(", "@import", "//cdn"] {
                assert!(!without.contains(outside), "{} has {outside}", file.path);
            }
            // Texts of tenants become text, never markup.
            for way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!file.text.contains(way), "{} has {way}", file.path);
            }
        }
    }

    #[test]
    fn what_a_browser_has_is_not_sent_again() {
        let first = find("main.js", &HeaderMap::new()).unwrap();
        assert_eq!(first.status(), StatusCode::OK);
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, first.headers()[header::ETAG].clone());
        assert_eq!(find("main.js", &headers).unwrap().status(), StatusCode::NOT_MODIFIED);
        headers.insert(header::IF_NONE_MATCH, HeaderValue::from_static("\"other\""));
        assert_eq!(find("main.js", &headers).unwrap().status(), StatusCode::OK);
        assert!(find("../mod.rs", &HeaderMap::new()).is_none());
    }
}
