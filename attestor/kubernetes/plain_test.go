package kubernetes

import (
	"encoding/base64"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/json"
)

// FuzzPlain holds plain to the library: what it reads, the library reads, to the same end.
func FuzzPlain(f *testing.F) {
	now := time.Now()
	for _, token := range []string{usual(now).unsigned(`{"alg":"RS256","kid":"k"}`, nil), usual(now).with(body{"aud": "meshca", "k8s.node": nil}).unsigned(`{"alg":"ES256","kid":"k","typ":"JWT"}`, nil)} {
		for _, segment := range strings.Split(token, ".") {
			raw, err := base64.RawURLEncoding.DecodeString(segment)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(raw)
		}
	}
	f.Add([]byte(`{"exp":1,"exp":2}`))
	f.Add([]byte(`{"exp":01}`))
	f.Add([]byte(`{"iss":"\u0041","aud":[]}`))
	f.Add([]byte(`{"alg":"RS256","crit":["b64"]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if c, ok := plainClaims(raw); ok {
			var want claims
			if err := json.Unmarshal(raw, &want); err != nil || !reflect.DeepEqual(c, want) {
				t.Errorf("claims %+v; the library says %+v, %v", c, want, err)
			}
		}
		if h, ok := plainHeader(raw); ok {
			var want header
			if err := json.Unmarshal(raw, &want); err != nil || !reflect.DeepEqual(h, want) {
				t.Errorf("header %+v; the library says %+v, %v", h, want, err)
			}
		}
		if c, refused := parseClaims(raw); refused == nil {
			_ = c.check("", "meshca", time.Hour, now)
			_ = c.evidence("c", "m")
		}
	})
}

// The usual token is what plain is for: were it to give up on it, nobody would notice but the clock.
func TestPlainReadsTheUsual(t *testing.T) {
	for _, change := range []body{{}, {"aud": "meshca"}, {"k8s.node": nil}, {"k8s.warnafter": nil}} {
		signed, refused := parseJWS(usual(time.Now()).with(change).unsigned(`{"alg":"RS256","kid":"k"}`, nil))
		if refused != nil {
			t.Fatal(refused)
		}
		if _, ok := plainClaims(signed.payload); !ok {
			t.Errorf("it gives up on %s", signed.payload)
		}
	}
	if _, ok := plainHeader([]byte(`{"alg":"RS256","kid":"k"}`)); !ok {
		t.Error("it gives up on the usual header")
	}
}
