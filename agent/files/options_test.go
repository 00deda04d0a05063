package files

import (
	"strings"
	"testing"
)

func TestOptions(t *testing.T) {
	group, root := 2000, 0
	c, err := ParseOptions("/v", &group, map[string]string{"files": "istio, gke", "other": "x"})
	if err != nil || c.Dir != "/v" || len(c.Names) != 2 || c.Names[1] != GKE || *c.GID != 2000 || c.Mode != 0o640 || c.After != nil {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err = ParseOptions("/v", nil, map[string]string{"files": "tls"}); err != nil || c.Mode != 0o644 || c.GID != nil {
		t.Errorf("without a group: %+v, %v", c, err)
	}
	if c, err = ParseOptions("/v", &root, map[string]string{"files": "tls", "filesMode": "0440"}); err != nil || c.Mode != 0o440 || *c.GID != 0 {
		t.Errorf("with a mode: %+v, %v", c, err)
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
		"mode alone":   {map[string]string{"filesMode": "0440"}, "files is missing"},
		"no mode":      {map[string]string{"files": "tls", "filesMode": "u+r"}, "octal"},
		"mode 0":       {map[string]string{"files": "tls", "filesMode": "0000"}, "octal"},
		"writable key": {map[string]string{"files": "tls", "filesMode": "0666"}, "lets others write"},
		"setuid":       {map[string]string{"files": "tls", "filesMode": "4600"}, "octal"},
	} {
		if _, err := ParseOptions("/v", nil, tt.options); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("istio,gke", "0640")
	f.Add("tls", "")
	f.Add(" credentialbundle , tls", "0777")
	f.Fuzz(func(t *testing.T, list, mode string) {
		c, err := ParseOptions("/v", nil, map[string]string{"files": list, "filesMode": mode})
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if err := c.Check(); err != nil || len(c.Names) > maxNames || c.Mode&0o133 != 0 {
			t.Fatalf("%+v: %v", c, err)
		}
	})
}
