//! Parquet, row by row, without the columns that no record needs.

use super::columns::{Columns, Row, Rows};
use super::input::{Input, Origin};
use crate::TrainError;
use crate::data::source::Place;
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::record::reader::RowIter;
use ::parquet::schema::types::Type;
use serde_json::{Map, Value};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

pub(super) const MAGIC: &[u8] = b"PAR1";

pub(super) fn rows(path: &Path, name: &Arc<str>, columns: &Columns) -> Result<Rows, TrainError> {
    let (origin, file) = Input::open_seekable(path, name)?;
    let whole = origin.whole();
    let damaged = |problem: String| whole.wrong(problem);
    let reader = caught(|| SerializedFileReader::new(file)).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
    let layout = columns.layout(&names).map_err(|problem| whole.wrong(problem))?;
    let wanted = layout.columns();
    let fields = schema.get_fields().iter().filter(|field| wanted.contains(&field.name()));
    let projection = Type::group_type_builder(schema.name());
    let projection = projection.with_fields(fields.cloned().collect());
    let projection = caught(|| projection.build()).map_err(damaged)?;
    let mut rows = caught(|| RowIter::from_file_into(Box::new(reader)).project(Some(projection)))
        .map_err(damaged)?;
    Ok(Box::new((1..).map_while(move |n| {
        let row = caught(|| rows.next().transpose()).transpose()?;
        Some(located(&origin, n, row))
    })))
}

/// The library returns errors for most damages, and panics at some: nobody goes on behind either.
fn caught<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read))
        .map_err(|_| problem(&"the reader failed"))
        .and_then(|result| result.map_err(|error| problem(&error)))
}

fn located(
    origin: &Origin,
    n: usize,
    row: Result<::parquet::record::Row, String>,
) -> Result<(Place, Row), TrainError> {
    let place = origin.row(n);
    let row = row.map_err(|problem| place.wrong(problem))?;
    let columns = row.into_columns().into_iter();
    let values = columns.map(|(name, field)| Ok((name, value(&field)?)));
    let row = values.collect::<Result<_, String>>().map_err(|problem| place.wrong(problem))?;
    Ok((place, row))
}

fn problem(error: &dyn fmt::Display) -> String {
    format!(
        "not a whole Parquet file, or of a kind that is not read ({error}); fetch or write it again"
    )
}

/// Texts, lists and groups as JSON; of other values only the kind matters, for the error.
fn value(field: &Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Str(text) => Value::String(text.clone()),
        // Some writers do not mark texts as such.
        Field::Bytes(bytes) => Value::String(
            std::str::from_utf8(bytes.data()).map_err(|_| "bytes that are not UTF-8 text")?.into(),
        ),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
        }
        Field::Group(row) => {
            let fields =
                row.get_column_iter().map(|(name, field)| Ok((name.clone(), value(field)?)));
            Value::Object(fields.collect::<Result<Map<_, _>, String>>()?)
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, field)| {
                let key = value(key)?;
                let key = key.as_str().map_or_else(|| key.to_string(), String::from);
                Ok((key, value(field)?))
            });
            Value::Object(entries.collect::<Result<Map<_, _>, String>>()?)
        }
        Field::Byte(n) => Value::from(*n),
        Field::Short(n) => Value::from(*n),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::UByte(n) => Value::from(*n),
        Field::UShort(n) => Value::from(*n),
        Field::UInt(n) => Value::from(*n),
        Field::ULong(n) => Value::from(*n),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        other => Value::String(other.to_string()),
    })
}
