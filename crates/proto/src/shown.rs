//! Messages as JSON, for people's tools: those of operations.proto with the names of their fields, and
//! enums by their short names.

use crate::v1;
use serde::Serializer;
use serde::ser::SerializeSeq;

/// "ATTACHED" of SESSION_STATE_ATTACHED, in lower case.
fn short(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

pub(crate) fn state<S: Serializer>(state: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    let state = v1::SessionState::try_from(*state).unwrap_or_default();
    serializer.serialize_str(&short(state.as_str_name(), "SESSION_STATE_"))
}

pub(crate) fn residency<S: Serializer>(residency: &i32, to: S) -> Result<S::Ok, S::Error> {
    let residency = v1::Residency::try_from(*residency).unwrap_or_default();
    to.serialize_str(&short(residency.as_str_name(), "RESIDENCY_"))
}

pub(crate) fn dtypes<S: Serializer>(dtypes: &[i32], serializer: S) -> Result<S::Ok, S::Error> {
    let mut list = serializer.serialize_seq(Some(dtypes.len()))?;
    for &dtype in dtypes {
        let dtype = v1::DType::try_from(dtype).unwrap_or_default();
        list.serialize_element(&short(dtype.as_str_name(), "DTYPE_"))?;
    }
    list.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_json_with_the_names_of_its_fields_and_values() {
        let info = v1::SessionInfo {
            session_id: "s".into(),
            state: v1::SessionState::Attached as i32,
            residency: v1::Residency::Device as i32,
            ..Default::default()
        };
        let view = v1::SessionView { info: Some(info), pinned: true, ..Default::default() };
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["info"]["state"], "attached");
        assert_eq!(json["info"]["residency"], "device");
        assert_eq!((&json["pinned"], &json["shared_loss"]), (&true.into(), &().into()));
        let dtypes = crate::WireDType::ALL.iter().map(|dtype| dtype.to_proto() as i32).collect();
        let trunk = v1::DescribeResponse { wire_dtypes: dtypes, ..Default::default() };
        let json = serde_json::to_value(&trunk).unwrap();
        let names: Vec<&str> = crate::WireDType::ALL.iter().map(|dtype| dtype.name()).collect();
        assert_eq!(json["wire_dtypes"], serde_json::json!(names));
        // What a newer side says has no name here.
        let info = v1::SessionInfo { state: 77, ..Default::default() };
        assert_eq!(serde_json::to_value(&info).unwrap()["state"], "unspecified");
    }
}
