package kubernetes

import (
	"encoding/base64"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

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

// Evidence is remembered, the token's payload must not be with it.
func TestEvidenceHoldsNoPayload(t *testing.T) {
	signed, refused := parseJWS(usual(time.Now()).unsigned(`{"alg":"RS256","kid":"k"}`, nil) + "c2lnbmF0dXJl")
	if refused != nil {
		t.Fatal(refused)
	}
	said, ok := plainClaims(signed.payload)
	if !ok {
		t.Fatal("the plain reader gives up on a usual token")
	}
	ev := said.evidence("prod", "test")
	k := &said.Kubernetes
	claimed := []string{said.Subject, said.ID, k.ServiceAccount.UID, k.Pod.Name, k.Pod.UID, k.Node.Name, k.Node.UID}
	for name, s := range map[string]string{
		"namespace": ev.Identity.Namespace(), "service account": ev.Identity.ServiceAccount(), "its UID": ev.ServiceAccountUID,
		"pod": ev.PodName, "pod UID": ev.PodUID, "node": ev.NodeName, "node UID": ev.NodeUID, "credential": ev.CredentialID,
	} {
		if s == "" {
			t.Errorf("%s: the usual token says nothing of it", name)
			continue
		}
		at := uintptr(unsafe.Pointer(unsafe.StringData(s)))
		for _, c := range claimed {
			if start := uintptr(unsafe.Pointer(unsafe.StringData(c))); at >= start && at < start+uintptr(len(c)) {
				t.Errorf("%s %q is a part of the payload", name, s)
			}
		}
	}
}
