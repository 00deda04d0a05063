package serial

import (
	"math/big"
	"strings"
	"testing"
)

func TestString(t *testing.T) {
	for _, c := range []struct{ hex, want string }{
		{"1", strings.Repeat("0", 31) + "1"},
		{"00ff", strings.Repeat("0", 30) + "ff"},
		{"f0123456789abcdef0123456789abcde", "f0123456789abcdef0123456789abcde"},
		// Of others: up to 20 octets (RFC 5280 §4.1.2.2), in whole bytes as openssl prints them.
		{"1f0123456789abcdef0123456789abcde", "01f0123456789abcdef0123456789abcde"},
		{"7fffffffffffffffffffffffffffffffffffffff", "7fffffffffffffffffffffffffffffffffffffff"},
	} {
		n, _ := new(big.Int).SetString(c.hex, 16)
		if got := String(n); got != c.want {
			t.Errorf("%s is %q, not %q", c.hex, got, c.want)
		}
	}
	if got := String(nil); got != "" {
		t.Errorf("none is %q", got)
	}
}

func TestParse(t *testing.T) {
	const ours = "00f123456789abcdef0123456789abcd"
	for text, want := range map[string]string{
		"": "", ours: ours,
		"f123456789abcdef0123456789abcd":                  ours, // Envoy's spelling
		"00:F1:23:45:67:89:AB:CD:EF:01:23:45:67:89:AB:CD": ours, // openssl's
		"0xf123456789abcdef0123456789abcd":                ours,
		"7":                                               strings.Repeat("0", 31) + "7",
		"0":                                               strings.Repeat("0", 32),
		"7fffffffffffffffffffffffffffffffffffffff": "7fffffffffffffffffffffffffffffffffffffff",
	} {
		if got, err := Parse(text); got != want || err != nil {
			t.Errorf("%q is %q (%v), not %q", text, got, err, want)
		}
	}
	for text, why := range map[string]string{
		"web": "not hexadecimal", ":": "not hexadecimal", "0x": "not hexadecimal", "1g": "not hexadecimal",
		"01" + strings.Repeat("00", 20): "longer than 20 octets",
		strings.Repeat("f", 1<<20):      "longer than 20 octets",
	} {
		if got, err := Parse(text); err == nil || !strings.Contains(err.Error(), why) || len(err.Error()) > 200 {
			t.Errorf("%.70q is %q: %v", text, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("00:F1:23")
	f.Add("0x1")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := Parse(text)
		if err != nil || got == "" {
			return
		}
		if again, err := Parse(got); again != got || err != nil {
			t.Errorf("%q is %q, which is %q (%v)", text, got, again, err)
		}
	})
}
