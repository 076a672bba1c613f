//! A line chart as SVG, of nothing but text: what a benchmark measured, for the eye.

use std::fmt::Write as _;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 46.0;

/// One curve.
pub(crate) struct Curve {
    pub(crate) name: &'static str,
    pub(crate) color: &'static str,
    /// In the order of x.
    pub(crate) points: Vec<(f64, f64)>,
}

pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    /// Whether each step of y is ten times the one before.
    pub(crate) logarithmic: bool,
    pub(crate) curves: Vec<Curve>,
}

impl Chart {
    fn ends(&self) -> (f64, f64, f64) {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let x = points().map(|point| point.0).fold(1.0, f64::max);
        let top = points().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max);
        let low = points().map(|point| point.1).filter(|y| *y > 0.0).fold(top, f64::min);
        if self.logarithmic {
            (x, 10_f64.powf(low.log10().floor()), 10_f64.powf(top.log10().ceil()))
        } else {
            (x, 0.0, nice(top))
        }
    }

    /// The picture.
    pub(crate) fn draw(&self) -> String {
        let (right, low, top) = self.ends();
        let x = |value: f64| LEFT + value / right * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| {
            let part = if self.logarithmic {
                (value.max(low) / low).log10() / (top / low).log10()
            } else {
                value / top
            };
            HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
        };
        let mut out = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" role="img"><title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><text x="{LEFT}" y="20" font-size="14" font-weight="bold">{title}</text>"##,
            title = self.title
        );
        for value in self.steps(low, top) {
            let at = y(value);
            write!(out, r##"<line x1="{LEFT}" x2="{:.0}" y1="{at:.1}" y2="{at:.1}" stroke="#ddd"/><text x="{:.0}" y="{:.1}" text-anchor="end">{}</text>"##, WIDTH - RIGHT, LEFT - 6.0, at + 4.0, number(value)).unwrap();
        }
        for step in 0..=6 {
            let value = right * f64::from(step) / 6.0;
            write!(
                out,
                r#"<text x="{:.1}" y="{:.0}" text-anchor="middle">{value:.0}</text>"#,
                x(value),
                HEIGHT - BOTTOM + 18.0
            )
            .unwrap();
        }
        write!(out, r#"<text x="{:.0}" y="{:.0}" text-anchor="middle">{}</text><text x="14" y="{:.0}" transform="rotate(-90 14 {:.0})" text-anchor="middle">{}</text>"#, LEFT + (WIDTH - LEFT - RIGHT) / 2.0, HEIGHT - 8.0, self.x, HEIGHT / 2.0, HEIGHT / 2.0, self.y).unwrap();
        let mut legend = LEFT;
        for curve in &self.curves {
            let points: Vec<String> = curve
                .points
                .iter()
                .map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value)))
                .collect();
            write!(out, r#"<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{}"/><line x1="{legend}" x2="{:.0}" y1="38" y2="38" stroke="{color}" stroke-width="3"/><text x="{:.0}" y="42">{}</text>"#, points.join(" "), legend + 18.0, legend + 24.0, curve.name, color = curve.color).unwrap();
            legend += 40.0 + 6.6 * f64::from(u32::try_from(curve.name.len()).unwrap());
        }
        out.push_str("</svg>\n");
        out
    }

    fn steps(&self, low: f64, top: f64) -> Vec<f64> {
        if self.logarithmic {
            let mut steps = vec![low];
            while steps.last().is_some_and(|last| *last < top * 0.99) {
                steps.push(steps[steps.len() - 1] * 10.0);
            }
            return steps;
        }
        (0..=5).map(|step| top * f64::from(step) / 5.0).collect()
    }
}

/// The next number that is easily divided by five.
fn nice(top: f64) -> f64 {
    let unit = 10_f64.powf(top.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|times| times * unit)
        .into_iter()
        .find(|nice| *nice >= top)
        .unwrap_or(top)
}

fn number(value: f64) -> String {
    if value >= 1.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value}") }
}
