package vault

import (
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// secret is a credential: nothing that prints it shows it, not even as a field of what is printed, where fmt calls no
// method but does not follow a pointer either.
type secret struct{ text *string }

func newSecret(text string) secret { return secret{&text} }

// reveal is for sending it.
func (s secret) reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

const redacted = "[redacted]"

func (s secret) String() string             { return redacted }
func (s secret) GoString() string           { return redacted }
func (s secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }
func (s secret) LogValue() slog.Value       { return slog.StringValue(redacted) }
func (s secret) MarshalText() ([]byte, error) {
	return []byte(redacted), nil
}

// credentialForms are Vault's tokens (hvs., hvb., hvr., and s. before 1.10) and JWTs.
var credentialForms = regexp.MustCompile(`\b(hv[sbr]\.[\w-]{8,}|[sb]\.[A-Za-z0-9]{20,}|eyJ[\w-]{4,}\.[\w-]+\.[\w-]*)`)

// maxText bounds what is told of a text of Vault's.
const maxText = 512

// scrub makes a text that came from Vault, or from whoever answers in its place, fit for errors and logs: none of these
// credentials, nothing that looks like one, one line, bounded.
func scrub(text string, known ...secret) string {
	known = slices.Clone(known)
	slices.SortFunc(known, func(a, b secret) int { return len(b.reveal()) - len(a.reveal()) })
	for _, s := range known {
		if value := s.reveal(); len(value) >= 6 {
			text = strings.ReplaceAll(text, value, redacted)
		}
	}
	text = credentialForms.ReplaceAllString(text, redacted)
	text = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, text)
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "…"
	}
	return text
}
