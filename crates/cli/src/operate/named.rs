//! Which session, or which of its snapshots, somebody means by the beginning of its id.

use anyhow::bail;
use offshoot_client::operations::{Overview, SessionView, SnapshotView};

/// Ids that are named where one beginning has several.
const MOST_SHOWN: usize = 8;

/// A session's id as the server writes it.
pub fn id_of(view: &SessionView) -> &str {
    view.info.as_ref().map_or("", |info| info.session_id.as_str())
}

/// For people: its id's beginning, and its name.
pub fn short(view: &SessionView) -> String {
    let name = view.info.as_ref().map_or("", |info| info.name.as_str());
    let id: String = id_of(view).chars().take(SHORT).collect();
    if name.is_empty() { id } else { format!("{id} ({name})") }
}

/// So much of an id is shown: with a thousand sessions two begin alike once in ten thousand times.
pub const SHORT: usize = 8;

/// The one session whose id begins so.
pub fn session<'a>(overview: &'a Overview, text: &str) -> anyhow::Result<&'a SessionView> {
    let wanted = text.trim().to_ascii_lowercase().replace('-', "");
    let begins = |view: &&SessionView| !wanted.is_empty() && id_of(view).starts_with(&wanted);
    let found: Vec<&SessionView> = overview.sessions.iter().filter(begins).collect();
    let ids = || found.iter().map(|view| short(view)).take(MOST_SHOWN).collect::<Vec<_>>();
    match found[..] {
        [one] => Ok(one),
        [] => bail!(
            "no session has an id that begins with {text:?}{}; offshoot sessions list shows them",
            if overview.is_operator { "" } else { " among those of this tenant" }
        ),
        _ => bail!(
            "{} sessions have an id that begins with {text:?}: {}; say more of it",
            found.len(),
            ids().join(", ")
        ),
    }
}

/// The one snapshot whose id this is, or begins so.
pub fn snapshot<'a>(all: &'a [SnapshotView], text: &str) -> anyhow::Result<&'a str> {
    let ids = || all.iter().filter_map(|view| Some(view.info.as_ref()?.snapshot_id.as_str()));
    if let Some(exact) = ids().find(|id| *id == text) {
        return Ok(exact);
    }
    let found: Vec<&str> = ids().filter(|id| !text.is_empty() && id.starts_with(text)).collect();
    match found[..] {
        [one] => Ok(one),
        [] => bail!(
            "the session has no snapshot {text:?}; it has {}",
            ids().collect::<Vec<_>>().join(", ")
        ),
        _ => bail!("{text:?} begins several: {}; say more of it", found.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_client::SnapshotInfo;
    use offshoot_client::operations::SessionSummary;

    fn overview(ids: &[&str]) -> Overview {
        let info = |id: &&str| SessionSummary { session_id: id.to_string(), ..Default::default() };
        let view = |id| SessionView { info: Some(info(id)), ..Default::default() };
        Overview { sessions: ids.iter().map(view).collect(), ..Default::default() }
    }

    #[test]
    fn a_beginning_is_enough_if_only_one_has_it() {
        let overview = overview(&["aabb", "aacc", "dddd"]);
        assert_eq!(id_of(session(&overview, "d").unwrap()), "dddd");
        assert_eq!(id_of(session(&overview, "AA-C").unwrap()), "aacc");
        let error = |text| session(&overview, text).unwrap_err().to_string();
        assert!(error("aa").contains("2 sessions") && error("aa").contains("aabb, aacc"));
        assert!(error("x").contains("no session") && error("").contains("no session"));
    }

    #[test]
    fn a_snapshot_is_named_wholly_or_by_its_beginning() {
        let view = |id: &str| SnapshotView {
            info: Some(SnapshotInfo { snapshot_id: id.into(), ..Default::default() }),
            ..Default::default()
        };
        let all = [view("1-step0"), view("12-step9"), view("13-step9")];
        assert_eq!(snapshot(&all, "1-step0").unwrap(), "1-step0");
        assert_eq!(snapshot(&all, "12").unwrap(), "12-step9");
        assert!(snapshot(&all, "1").unwrap_err().to_string().contains("several"));
        assert!(snapshot(&all, "2").unwrap_err().to_string().contains("it has 1-step0"));
    }
}
