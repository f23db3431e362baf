//! Changes to a tenants file's text that leave everything else in it as it is.

use anyhow::{Context, anyhow, bail, ensure};
use offshoot_server::access::{NewToken, Tenant, parse_tenants};
use std::collections::HashMap;
use std::time::SystemTime;
use toml_edit::{ArrayOfTables, Datetime, DocumentMut, InlineTable, Item, Table, Value, value};

/// A tenants file's text, as something to change.
pub struct Tenants {
    document: DocumentMut,
    /// When each token ends, by id.
    ends: HashMap<String, Option<SystemTime>>,
}

/// A token as the file has it.
pub struct Token {
    id: String,
    hash: String,
    expires: Option<SystemTime>,
}

impl Token {
    pub fn new(token: &NewToken, expires: Option<SystemTime>) -> Token {
        Token { id: token.id.clone(), hash: token.hash().to_string(), expires }
    }

    fn values(&self) -> anyhow::Result<Vec<(&'static str, Value)>> {
        let mut values = vec![("id", Value::from(&self.id)), ("sha256", Value::from(&self.hash))];
        if let Some(expires) = self.expires {
            values.push(("expires", datetime(expires)?));
        }
        Ok(values)
    }
}

/// What a tenant may have and do; none is not written.
pub struct Numbers {
    pub weight: Option<u64>,
    pub is_operator: bool,
    pub quotas: [(&'static str, Option<u64>); 7],
}

/// Whole seconds, in UTC.
fn datetime(time: SystemTime) -> anyhow::Result<Value> {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    Ok(Value::from(text.parse::<Datetime>().context("a token's end")?))
}

fn number(value: u64) -> anyhow::Result<Item> {
    Ok(toml_edit::value(i64::try_from(value).context("a number is too large")?))
}

impl Tenants {
    /// The text of these tenants.
    pub fn parse(text: &str) -> anyhow::Result<Tenants> {
        let tenants = parse_tenants(text).map_err(anyhow::Error::msg)?;
        let tokens = tenants.iter().flat_map(Tenant::tokens);
        let ends = tokens.map(|(id, end)| (id.to_string(), end)).collect();
        Ok(Tenants { document: text.parse()?, ends })
    }

    /// The text as it is now, if it is one of tenants.
    pub fn into_text(self) -> anyhow::Result<String> {
        let text = self.document.to_string();
        parse_tenants(&text).map_err(anyhow::Error::msg)?;
        Ok(text)
    }

    pub fn add(&mut self, name: &str, numbers: &Numbers, token: Token) -> anyhow::Result<()> {
        ensure!(
            self.find(name).is_err(),
            "tenant {name} is there already; `offshoot tenant rotate {name}` gives it a new token"
        );
        let mut tenant = Table::new();
        tenant["name"] = value(name);
        if let Some(weight) = numbers.weight {
            tenant["weight"] = number(weight)?;
        }
        if numbers.is_operator {
            tenant["operator"] = value(true);
        }
        push(&mut tenant, &token)?;
        let mut quotas = Table::new();
        for (key, quota) in numbers.quotas {
            if let Some(quota) = quota {
                quotas[key] = number(quota)?;
            }
        }
        if !quotas.is_empty() {
            tenant["quotas"] = Item::Table(quotas);
        }
        if !self.document.contains_key("tenants") {
            self.document["tenants"] = Item::ArrayOfTables(ArrayOfTables::new());
        }
        if !self.document["tenants"].as_array_of_tables().is_none_or(ArrayOfTables::is_empty) {
            tenant.decor_mut().set_prefix("\n");
        }
        self.tables()?.push(tenant);
        Ok(())
    }

    /// Adds a token; the others end then, unless they end before. Those that have ended already go.
    pub fn rotate(&mut self, name: &str, token: Token, old_end: SystemTime) -> anyhow::Result<()> {
        let (end, ends) = (datetime(old_end)?, std::mem::take(&mut self.ends));
        let is_after =
            |id: &str, time| ends.get(id).copied().flatten().is_none_or(|end| end > time);
        let tenant = self.find(name)?;
        let now = SystemTime::now();
        retain(tenant, |id| is_after(id, now));
        for_each(tenant, |entry| {
            if is_after(id_of(entry), old_end) {
                entry.insert("expires", Item::Value(end.clone()));
            }
        });
        push(tenant, &token)
    }

    /// Takes out the token with this id, or all. Which ones.
    pub fn revoke(&mut self, name: &str, id: Option<&str>) -> anyhow::Result<Vec<String>> {
        let tenant = self.find(name)?;
        let (mut gone, mut all) = (Vec::new(), Vec::new());
        retain(tenant, |token| {
            all.push(token.to_string());
            let goes = id.is_none_or(|id| id == token);
            if goes {
                gone.push(token.to_string());
            }
            !goes
        });
        match (id, all.is_empty()) {
            _ if !gone.is_empty() => Ok(gone),
            (_, true) => bail!("tenant {name} has no token"),
            (id, false) => {
                let (id, all) = (id.unwrap_or_default(), all.join(", "));
                bail!("tenant {name} has no token {id:?}; it has {all}")
            }
        }
    }

    pub fn remove(&mut self, name: &str) -> anyhow::Result<()> {
        self.find(name)?;
        let tables = self.tables()?;
        tables.retain(|tenant| tenant.get("name").and_then(Item::as_str) != Some(name));
        Ok(())
    }

    fn tables(&mut self) -> anyhow::Result<&mut ArrayOfTables> {
        let tenants = self.document.get_mut("tenants").and_then(Item::as_array_of_tables_mut);
        tenants.context("the file has its tenants in one line; write each as [[tenants]] instead")
    }

    fn find(&mut self, name: &str) -> anyhow::Result<&mut Table> {
        let known = |tables: &ArrayOfTables| {
            let names = tables.iter().filter_map(|tenant| tenant.get("name")?.as_str());
            names.map(str::to_string).collect::<Vec<_>>()
        };
        let names = self.document.get("tenants").and_then(Item::as_array_of_tables).map(known);
        let names = names.unwrap_or_default();
        let Some(place) = names.iter().position(|known| known == name) else {
            let known = if names.is_empty() { "nobody".into() } else { names.join(", ") };
            return Err(anyhow!("there is no tenant {name:?}; there is {known}"));
        };
        self.tables()?.get_mut(place).context("a tenant")
    }
}

fn id_of(entry: &dyn toml_edit::TableLike) -> &str {
    entry.get("id").and_then(Item::as_str).unwrap_or_default()
}

/// Adds a token in the way in which the tenant has its others.
fn push(tenant: &mut Table, token: &Token) -> anyhow::Result<()> {
    let values = token.values()?;
    match tenant.entry("tokens").or_insert(Item::ArrayOfTables(ArrayOfTables::new())) {
        Item::ArrayOfTables(tables) => {
            let mut table = Table::new();
            for (key, one) in values {
                table.insert(key, Item::Value(one));
            }
            tables.push(table);
        }
        Item::Value(Value::Array(array)) => {
            array.push(values.into_iter().collect::<InlineTable>());
        }
        _ => bail!("the tenant's tokens are no list"),
    }
    Ok(())
}

fn for_each(tenant: &mut Table, change: impl Fn(&mut dyn toml_edit::TableLike)) {
    match tenant.get_mut("tokens") {
        Some(Item::ArrayOfTables(tables)) => tables.iter_mut().for_each(|table| change(table)),
        Some(Item::Value(Value::Array(array))) => {
            let tables = array.iter_mut().filter_map(Value::as_inline_table_mut);
            tables.for_each(|table| change(table));
        }
        _ => {}
    }
}

/// Keeps the tokens for whose ids `keep` says so.
fn retain(tenant: &mut Table, mut keep: impl FnMut(&str) -> bool) {
    let mut keeps = |entry: &dyn toml_edit::TableLike| keep(id_of(entry));
    match tenant.get_mut("tokens") {
        Some(Item::ArrayOfTables(tables)) => tables.retain(|table| keeps(table)),
        Some(Item::Value(Value::Array(array))) => {
            array.retain(|one| one.as_inline_table().is_none_or(|table| keeps(table)));
        }
        _ => {}
    }
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
