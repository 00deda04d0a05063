package files

import (
	"strings"
	"testing"
)

func TestOptions(t *testing.T) {
	c, ok, err := ParseOptions("/v", map[string]string{"files": "istio, gke", "fsGroup": "2000", "other": "x"})
	if err != nil || !ok || c.Dir != "/v" || len(c.Names) != 2 || c.Names[1] != GKE || *c.GID != 2000 || c.Mode != 0o640 || c.After != nil {
		t.Errorf("%+v, %t, %v", c, ok, err)
	}
	if c, ok, err = ParseOptions("/v", map[string]string{"files": "tls"}); err != nil || !ok || c.Mode != 0o644 || c.GID != nil {
		t.Errorf("without a group: %+v, %t, %v", c, ok, err)
	}
	if c, ok, err = ParseOptions("/v", map[string]string{"files": "tls", "filesMode": "0440", "fsGroup": "0"}); err != nil || !ok || c.Mode != 0o440 || *c.GID != 0 {
		t.Errorf("with a mode: %+v, %t, %v", c, ok, err)
	}
	if _, ok, err = ParseOptions("/v", map[string]string{"fsGroup": "2000"}); ok || err != nil {
		t.Errorf("not asked for: %t, %v", ok, err)
	}
	for name, tt := range map[string]struct {
		options map[string]string
		want    string
	}{
		"empty":        {map[string]string{"files": ""}, `"" is no set of names: istio, gke, tls or credentialbundle`},
		"unknown":      {map[string]string{"files": "tls,pkcs12"}, `"pkcs12" is no set`},
		"twice":        {map[string]string{"files": "tls,tls"}, "twice"},
		"many":         {map[string]string{"files": "tls,,,,,"}, "more than"},
		"long":         {map[string]string{"files": strings.Repeat("x", 300)}, "longer than"},
		"mode alone":   {map[string]string{"filesMode": "0440"}, "without files"},
		"no mode":      {map[string]string{"files": "tls", "filesMode": "u+r"}, "octal"},
		"mode 0":       {map[string]string{"files": "tls", "filesMode": "0000"}, "octal"},
		"writable key": {map[string]string{"files": "tls", "filesMode": "0666"}, "lets others write"},
		"setuid":       {map[string]string{"files": "tls", "filesMode": "4600"}, "octal"},
		"no group":     {map[string]string{"files": "tls", "fsGroup": "-1"}, "no group's number"},
	} {
		_, ok, err := ParseOptions("/v", tt.options)
		if ok || err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %t, %v, want %q", name, ok, err, tt.want)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("istio,gke", "0640", "1000")
	f.Add("tls", "", "")
	f.Add(" credentialbundle , tls", "0777", "-0")
	f.Fuzz(func(t *testing.T, list, mode, group string) {
		c, ok, err := ParseOptions("/v", map[string]string{"files": list, "filesMode": mode, "fsGroup": group})
		if ok != (err == nil) {
			t.Fatalf("%t, %v", ok, err)
		}
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if err := c.Check(); err != nil || len(c.Names) > maxNames || c.Mode&0o133 != 0 || c.GID != nil && *c.GID < 0 {
			t.Fatalf("%+v: %v", c, err)
		}
	})
}
