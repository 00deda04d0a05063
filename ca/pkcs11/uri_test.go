package pkcs11

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const reached = "?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source="
	for text, want := range map[string]URI{
		"pkcs11:token=meshca" + reached + "/etc/pin":                          {Token: "meshca", PinSource: "/etc/pin"},
		"PKCS11:token=my%20token;object=root%3B1;id=%01%FF" + reached + "pin": {Token: "my token", Object: "root;1", ID: "\x01\xff", PinSource: "pin"},
		"pkcs11:serial=0f;object=a=b" + reached + "file:/etc/pin":             {Serial: "0f", Object: "a=b", PinSource: "/etc/pin"},
		"pkcs11:slot-id=5" + reached + "file:///etc/a%20pin":                  {SlotID: "5", PinSource: "/etc/a pin"},
	} {
		want.Module = "/usr/lib/softhsm/libsofthsm2.so"
		got, err := Parse(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if again, err := Parse(got.Full()); err != nil || again != want {
			t.Errorf("%s, written as %s: %+v, %v", text, got.Full(), again, err)
		}
		if key, err := want.WithKey("", "").Resolve(got.String()); err != nil || key != want {
			t.Errorf("%s, resolved: %+v, %v", got, key, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const good = "?module-path=/m.so&pin-source=/pin"
	for text, why := range map[string]string{
		"/var/lib/root.key": "begins with pkcs11:",
		"pkcs11:token=a?module-path=/m.so&pin-value=4711":           "mode 0600",
		"pkcs11:token=a;pin-value=4711" + good:                      "mode 0600",
		"pkcs11:token=a?module-path=/m.so":                          "pin-source",
		"pkcs11:token=a?pin-source=/pin":                            "which library",
		"pkcs11:token=a?module-path=m.so&pin-source=/pin":           "absolute",
		"pkcs11:token=a;module-path=/m.so?pin-source=/pin":          "behind the question mark",
		"pkcs11:object=a" + good:                                    "exactly one of token",
		"pkcs11:token=a;serial=1" + good:                            "exactly one of token",
		"pkcs11:token=a;token=b" + good:                             "named twice",
		"pkcs11:token=" + good:                                      "empty",
		"pkcs11:token" + good:                                       "no value",
		"pkcs11:token=a;manufacturer=b" + good:                      "manufacturer",
		"pkcs11:slot-id=-1" + good:                                  "decimal",
		"pkcs11:token=%zz4711" + good:                               "percent-encoded",
		"pkcs11:token=a%00" + good:                                  "percent-encoded",
		"pkcs11:token=a?module-path=/m.so&pin-source=|get-pin":      "nothing is run",
		"pkcs11:token=a?module-path=/m.so&pin-source=https://x/pin": "nothing is run",
		"pkcs11:token=" + strings.Repeat("a", maxURI) + good:        "at most",
	} {
		_, err := Parse(text)
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%.80s: got %v, want %q", text, err, why)
		}
		if err != nil && strings.Contains(err.Error(), "4711") {
			t.Errorf("the error repeats a value: %v", err)
		}
	}
	u := URI{Token: "a", Module: "/m.so", PinSource: "/pin"}
	for _, name := range []string{"", "x", "pkcs11:token=b;object=k", "pkcs11:serial=a;object=k", "pkcs11:token=a;pin-value=1"} {
		if k, err := u.Resolve(name); err == nil {
			t.Errorf("%s: %+v", name, k)
		}
	}
	if k, err := (URI{}).Resolve("pkcs11:slot-id="); err == nil {
		t.Errorf("no token: %+v", k)
	}
}
