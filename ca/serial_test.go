package ca_test

import (
	"math/big"
	"strings"
	"testing"

	"github.com/meshca/meshca/ca"
)

func TestSerialString(t *testing.T) {
	for _, c := range []struct{ hex, want string }{
		{"1", strings.Repeat("0", 31) + "1"},
		{"00ff", strings.Repeat("0", 30) + "ff"},
		{"f0123456789abcdef0123456789abcde", "f0123456789abcdef0123456789abcde"},
		// Of others: up to 20 octets (RFC 5280 §4.1.2.2), in whole bytes as openssl prints them.
		{"1f0123456789abcdef0123456789abcde", "01f0123456789abcdef0123456789abcde"},
		{"7fffffffffffffffffffffffffffffffffffffff", "7fffffffffffffffffffffffffffffffffffffff"},
	} {
		n, _ := new(big.Int).SetString(c.hex, 16)
		if got := ca.SerialString(n); got != c.want {
			t.Errorf("%s is %q, not %q", c.hex, got, c.want)
		}
	}
}
