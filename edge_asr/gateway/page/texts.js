// Every word of the page in English and Chinese.

const TEXTS = {
  en: {
    "options": "Options", "done": "Done", "mode": "Talk button", "mode-hold": "Hold to talk",
    "mode-toggle": "Press to start, press to stop", "language": "Language of this page",
    "way": "Audio", "way-auto": "Automatic (WebRTC, else WebSocket)", "way-pcm": "Uncompressed (lowest delay)",
    "way-opus": "Compressed (slow networks)", "token": "Token of this station", "dashboard": "Dashboard",
    "authority": "This box's certificate", "history": "Said here",
    "nothing-yet": "Nothing yet. Commands and texts of this session appear here.",
    "confirm": "Yes", "cancel": "No", "confirm-kicker": "Shall I?", "time-left": "Time left to answer",
    "hold": "Hold to talk", "press": "Press to talk", "release": "Let go to send", "press-again": "Press to send",
    "idle": "Ready", "listening": "Listening …", "transcribing": "Transcribing …", "sending-later":
      "No connection: up to 30 s are kept and sent when it is back",
    "keys": "Space bar works too",
    "gateway-on": "Connected", "gateway-off": "No connection", "gateway-connecting": "Connecting",
    "broker-connected": "MES reachable", "broker-offline": "MES away, kept safe", "broker-none": "No broker set",
    "broker-unknown": "MES unknown",
    "command": "Command", "transcript": "Text", "rejected": "Not understood", "expired": "Too late",
    "pending": "Waits for a yes", "kind-confirmed": "confirmed",
    "reason-not-understood": "Not understood", "reason-ambiguous": "Unclear which", "reason-no-speech": "No speech",
    "reason-language": "Other language", "reason-unsafe-number": "Number unclear", "reason-too-noisy": "Too noisy",
    "reason-recognizer-failed": "Recognition failed", "reason-not-confirmed": "Not confirmed",
    "reason-cancelled": "Cancelled", "reason-not-allowed": "Not allowed here",
    "expired-detail": "It took too long to arrive and was not run.",
    "overloaded": "The box is busy; your words are kept and follow.",
    "need-https": "The microphone needs a secure connection.",
    "need-https-help": "Open this page by https:// and install this box's certificate on this device once; see docs/gateway.md.",
    "no-microphone": "No microphone was found.",
    "no-microphone-help": "Connect a headset or microphone, then press the button again.",
    "denied": "This page may not use the microphone.",
    "denied-help": "Allow it in the browser's site settings (the icon beside the address), then press the button again.",
    "busy-microphone": "Another program holds the microphone.",
    "busy-microphone-help": "Close it, then press the button again.",
    "token-needed": "This station has no valid token.",
    "token-needed-help": "Ask who looks after the box for its link, or enter the token here.",
    "enter-token": "Enter token", "full": "The box takes nobody else just now; trying again by itself.",
    "session-over": "The session has ended; press the button to go on.",
    "lang-zh": "Chinese", "lang-en": "English", "lang-yue": "Cantonese", "lang-ja": "Japanese", "lang-ko": "Korean",
    "emotion-HAPPY": "happy", "emotion-SAD": "sad", "emotion-ANGRY": "angry", "emotion-NEUTRAL": "calm",
    "emotion-FEARFUL": "afraid", "emotion-DISGUSTED": "disgusted", "emotion-SURPRISED": "surprised",
    "event-BGM": "music", "event-Laughter": "laughter", "event-Applause": "applause", "event-Cry": "crying",
    "event-Sneeze": "sneeze", "event-Breath": "breath", "event-Cough": "cough",
    "sure": "sure", "lost": "of audio were lost",
  },
  zh: {
    "options": "设置", "done": "完成", "mode": "讲话按钮", "mode-hold": "按住说话",
    "mode-toggle": "按一下开始，再按一下结束", "language": "页面语言",
    "way": "音频", "way-auto": "自动（WebRTC，否则 WebSocket）", "way-pcm": "不压缩（延迟最低）",
    "way-opus": "压缩（慢速网络）", "token": "本工位的令牌", "dashboard": "监控面板",
    "authority": "本设备的证书", "history": "本次记录",
    "nothing-yet": "暂无内容。本次会话的指令和文字会显示在这里。",
    "confirm": "是", "cancel": "否", "confirm-kicker": "确认执行吗？", "time-left": "剩余时间",
    "hold": "按住说话", "press": "按下说话", "release": "松开发送", "press-again": "再按发送",
    "idle": "就绪", "listening": "正在听…", "transcribing": "正在识别…",
    "sending-later": "连接已断开：最多保留 30 秒语音，恢复后自动发送",
    "keys": "也可以用空格键",
    "gateway-on": "已连接", "gateway-off": "未连接", "gateway-connecting": "正在连接",
    "broker-connected": "MES 在线", "broker-offline": "MES 离线，已安全保存", "broker-none": "未设置 MQTT",
    "broker-unknown": "MES 状态未知",
    "command": "指令", "transcript": "文字", "rejected": "未听懂", "expired": "已过期",
    "pending": "等待确认", "kind-confirmed": "已确认",
    "reason-not-understood": "未听懂", "reason-ambiguous": "不明确", "reason-no-speech": "没有语音",
    "reason-language": "其他语言", "reason-unsafe-number": "数字不清楚", "reason-too-noisy": "噪声太大",
    "reason-recognizer-failed": "识别失败", "reason-not-confirmed": "未确认",
    "reason-cancelled": "已取消", "reason-not-allowed": "此处不允许",
    "expired-detail": "到达太晚，没有执行。",
    "overloaded": "设备繁忙；您的话已保存，稍后处理。",
    "need-https": "麦克风需要安全连接。",
    "need-https-help": "请用 https:// 打开本页面，并在此设备上安装一次本机证书；参见 docs/gateway.md。",
    "no-microphone": "没有找到麦克风。",
    "no-microphone-help": "请连接耳机或麦克风，然后再按一次按钮。",
    "denied": "本页面不能使用麦克风。",
    "denied-help": "请在浏览器的网站设置中允许（地址栏旁的图标），然后再按一次按钮。",
    "busy-microphone": "另一个程序正在使用麦克风。",
    "busy-microphone-help": "请关闭它，然后再按一次按钮。",
    "token-needed": "本工位没有有效的令牌。",
    "token-needed-help": "请向设备管理员索取链接，或在此输入令牌。",
    "enter-token": "输入令牌", "full": "设备目前无法接入更多工位；会自动重试。",
    "session-over": "会话已结束；按下按钮继续。",
    "lang-zh": "中文", "lang-en": "英语", "lang-yue": "粤语", "lang-ja": "日语", "lang-ko": "韩语",
    "emotion-HAPPY": "高兴", "emotion-SAD": "悲伤", "emotion-ANGRY": "生气", "emotion-NEUTRAL": "平静",
    "emotion-FEARFUL": "害怕", "emotion-DISGUSTED": "厌恶", "emotion-SURPRISED": "惊讶",
    "event-BGM": "音乐", "event-Laughter": "笑声", "event-Applause": "掌声", "event-Cry": "哭声",
    "event-Sneeze": "喷嚏", "event-Breath": "呼吸", "event-Cough": "咳嗽",
    "sure": "置信度", "lost": "的音频丢失",
  },
};

let chosen = "en";

export function choose(language) {
  chosen = language in TEXTS ? language : "en";
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
}

export function text(key) {
  return TEXTS[chosen][key] ?? key.replace(/^[a-z]+-/, "");
}

export function fill(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", text(element.dataset.label));
}
