use crate::server::Sample;
use anyhow::{Context, anyhow};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::Path;

const SIZE: (u32, u32) = (1600, 900);
const SHADE: RGBColor = RGBColor(245, 226, 222);
const LINES: [RGBColor; 2] = [RGBColor(33, 115, 181), RGBColor(33, 140, 58)];
const RESIDENT: RGBColor = RGBColor(132, 90, 181);
/// Rates are means of so many samples.
const SPAN: usize = 10;

/// Resident memory above, tokens per second below; the attacks are shaded and named.
pub fn write(
    path: &Path,
    samples: &[Sample],
    attacks: &[(String, f64, f64)],
) -> anyhow::Result<()> {
    let mut pixels = vec![255; (SIZE.0 * SIZE.1 * 3) as usize];
    let root = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
    draw(&root, samples, attacks).map_err(|error| anyhow!("drawing: {error}"))?;
    drop(root);
    let file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let mut encoder = png::Encoder::new(file, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish().context("writing the file's end")
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(root: &Area<'_>, samples: &[Sample], attacks: &[(String, f64, f64)]) -> Drawn {
    for (style, font) in
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())]
    {
        register_font("sans-serif", style, font).map_err(|_| "the built-in font cannot be read")?;
    }
    root.fill(&WHITE)?;
    let (above, below) = root.split_vertically(450);
    let megabytes: Vec<(f64, f64)> =
        samples.iter().map(|s| (s.seconds / 60.0, s.resident as f64 / 1e6)).collect();
    let memory =
        Chart { title: "Server's resident memory, MB", curves: vec![("", RESIDENT, megabytes)] };
    memory.draw(&above, attacks)?;
    let rate = |team: usize| -> Vec<(f64, f64)> {
        let pairs = samples.windows(SPAN + 1);
        let rates = pairs.map(|w| {
            let (first, last) = (&w[0], &w[SPAN]);
            let tokens = (last.tokens[team] - first.tokens[team]) as f64;
            (last.seconds / 60.0, tokens / (last.seconds - first.seconds))
        });
        rates.collect()
    };
    let curves = vec![("blue", LINES[0], rate(0)), ("green", LINES[1], rate(1))];
    Chart { title: "Tokens per second of the other tenants", curves }.draw(&below, attacks)?;
    Ok(root.present()?)
}

/// Its name, its colour and its points.
type Curve = (&'static str, RGBColor, Vec<(f64, f64)>);

struct Chart {
    title: &'static str,
    curves: Vec<Curve>,
}

impl Chart {
    fn draw(&self, area: &Area<'_>, attacks: &[(String, f64, f64)]) -> Drawn {
        let points = || self.curves.iter().flat_map(|(_, _, points)| points);
        let end = points().map(|p| p.0).fold(1e-9, f64::max);
        let top = 1.15 * points().map(|p| p.1).fold(1e-9, f64::max);
        let font = |size: u32| ("sans-serif", size).into_font();
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, font(22))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart.draw_series(attacks.iter().map(|(_, from, to)| {
            Rectangle::new([(from / 60.0, 0.0), (to / 60.0, top)], SHADE.filled())
        }))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("minutes")
            .label_style(font(16))
            .draw()?;
        chart.draw_series(attacks.iter().map(|(name, from, _)| {
            Text::new(name.clone(), (from / 60.0, 0.985 * top), font(13))
        }))?;
        for (name, colour, points) in &self.curves {
            let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
            let drawn = chart.draw_series(line)?;
            if !name.is_empty() {
                let colour = *colour;
                drawn
                    .label(*name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
            }
        }
        if self.curves.len() > 1 {
            let mut labels = chart.configure_series_labels();
            let labels = labels.position(SeriesLabelPosition::LowerRight).label_font(font(16));
            labels.background_style(WHITE.mix(0.8)).draw()?;
        }
        Ok(())
    }
}
